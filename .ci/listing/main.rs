//! Prints the public items of a crate, one a line, from the JSON that rustdoc made of it.
//!
//! Of derived traits only the `impl` lines are printed. Of the traits that the compiler implements
//! itself only `Send` and `Sync` are printed.

use std::collections::HashSet;
use std::error::Error;

use public_api::Builder;

fn main() -> Result<(), Box<dyn Error>> {
    let json = std::env::args_os().nth(1).ok_or("usage: listing JSON")?;
    let listing = |derived: bool, automatic: bool| {
        Builder::from_rustdoc_json(&json)
            .omit_blanket_impls(true)
            .omit_auto_derived_impls(!derived)
            .omit_auto_trait_impls(!automatic)
            .include_function_parameter_names(true)
            .build()
            .map(|public| public.items().map(ToString::to_string).collect::<Vec<_>>())
    };
    let written: HashSet<String> = listing(false, false)?.into_iter().collect();
    for item in listing(true, true)? {
        let derived =
            item.starts_with("impl") && !item.contains("core::marker::StructuralPartialEq");
        let automatic = ["Freeze", "Unpin", "UnsafeUnpin", "RefUnwindSafe", "UnwindSafe"];
        let left_out = automatic.iter().any(|name| item.contains(&format!("::{name} for ")));
        if written.contains(&item) || derived && !left_out {
            println!("{item}");
        }
    }
    Ok(())
}
