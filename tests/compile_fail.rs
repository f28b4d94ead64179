//! The types refuse misuse at compile time.
//!
//! Each program in `tests/compile_fail` fails with the error code in its first line. The control
//! program compiles. Only the code is compared, so every compiler version passes. All programs but
//! the control are modules of one program, which is compiled once.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

#[test]
fn programs_that_would_race_do_not_compile() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile_fail");
    let programs = package.join("src").join("bin");
    let refused = programs.join("refused");
    let _ = fs::remove_dir_all(&programs);
    fs::create_dir_all(&refused).unwrap();
    // The same versions as ours, which are on the machine already.
    fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    let manifest = format!(
        "[package]\nname = \"compile-fail\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n\
         cpu-gpu-buffer = {{ path = {root:?} }}\n\
         bytemuck = {{ version = \"1\", features = [\"derive\", \"min_const_generics\"] }}\n"
    );
    fs::write(package.join("Cargo.toml"), manifest).unwrap();

    let mut expected = BTreeMap::new();
    let mut modules = String::from("fn main() {}\n");
    for entry in fs::read_dir(root.join("tests/compile_fail")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let outcome = text.lines().next().and_then(|line| line.strip_prefix("// ")).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if outcome == "compiles" {
            fs::copy(&path, programs.join(&name)).unwrap();
        } else {
            fs::copy(&path, refused.join(&name)).unwrap();
            modules += &format!("mod {};\n", name.strip_suffix(".rs").unwrap());
        }
        expected.insert(name, outcome.to_string());
    }
    fs::write(refused.join("main.rs"), modules).unwrap();
    assert!(expected.len() > 10 && expected["control.rs"] == "compiles");

    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["check", "--offline", "--bins", "--keep-going", "--message-format", "short"])
        .env("CARGO_TARGET_DIR", package.join("target"))
        .env_remove("RUSTFLAGS")
        .current_dir(&package)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    // `src/bin/refused/name.rs:7:5: error[E0502]: ...`
    let mut seen: BTreeMap<String, Vec<String>> =
        expected.keys().map(|name| (name.clone(), Vec::new())).collect();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("src/bin/") else { continue };
        let rest = rest.strip_prefix("refused/").unwrap_or(rest);
        let Some((name, _)) = rest.split_once(':') else { continue };
        let Some(at) = rest.find("error") else { continue };
        seen.get_mut(name).unwrap().push(rest[at..].to_string());
    }
    for (name, outcome) in &expected {
        let errors = &seen[name];
        if outcome == "compiles" {
            assert!(errors.is_empty() && text.contains("could not compile"), "{name}:\n{text}");
        } else {
            assert!(!errors.is_empty(), "{name} compiles, and should not:\n{text}");
            // A code, and for some programs a part of the message.
            let (code, message) = outcome.split_once(": ").unwrap_or((outcome, ""));
            let as_expected = |error: &String| error.starts_with(code) && error.contains(message);
            assert!(errors.iter().all(as_expected), "{name}: {errors:?}\n{text}");
        }
    }
}
