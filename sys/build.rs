//! Generates the bindings (feature `bindgen`) and links the static runtime (feature `static`).
//!
//! Without these features the script does nothing. docs.rs has neither headers nor an archive, and
//! links nothing. There the script takes the committed bindings and an archive without functions.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    #[cfg(feature = "bindgen")]
    generate::bindings();
    #[cfg(feature = "static")]
    if let Err(why) = archive::link() {
        println!("cargo::error=feature `static`: {why}");
    }
}

#[cfg(feature = "static")]
#[path = "src/search_paths.rs"]
mod search_paths;

#[cfg(feature = "static")]
mod archive {
    use std::collections::HashSet;
    use std::env;
    use std::path::PathBuf;

    const NAME: &str = "libcudart_static.a";

    /// Links the archive, and writes the macro that knows which bound functions it lacks.
    pub fn link() -> Result<(), String> {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        println!("cargo::rerun-if-changed=src/bindings.rs");
        let bindings = match cfg!(feature = "bindgen") {
            true => out.join("bindings.rs"),
            false => "src/bindings.rs".into(),
        };
        let bindings = std::fs::read_to_string(bindings).expect("the bindings can be read");
        let mut absent = functions(&bindings);
        if env::var_os("DOCS_RS").is_none() {
            let defined = link_archive()?;
            absent.retain(|name| !defined.contains(*name));
        }
        let mut text = String::from("macro_rules! linked {\n");
        for name in absent {
            text += &format!("    ({name} $($signature:tt)*) => {{ None }};\n");
        }
        text += "    ($name:ident($($arg:ident: $type:ty),*) -> $status:ty) => {{
        unsafe extern \"C\" { fn $name($($arg: $type),*) -> $status; }
        Some($name as unsafe extern \"C\" fn($($type),*) -> $status)
    }};
}
";
        std::fs::write(out.join("linked.rs"), text).expect("OUT_DIR is writable");
        Ok(())
    }

    /// The functions in the table of the bindings.
    fn functions(bindings: &str) -> Vec<&str> {
        let table =
            bindings.split("runtime! {").nth(1).expect("the bindings have a table of functions");
        let named = table.split("pub fn ").skip(1);
        named.map(|rest| rest.split('(').next().expect("a name")).collect()
    }

    /// Finds and links the archive. Returns the symbols that it defines.
    fn link_archive() -> Result<HashSet<String>, String> {
        let target = |name| env::var(name).expect("cargo sets the target");
        let (os, architecture) = (target("CARGO_CFG_TARGET_OS"), target("CARGO_CFG_TARGET_ARCH"));
        if os != "linux" {
            return Err("the static runtime is linked on Linux only".into());
        }
        let variable = |name: &str| {
            println!("cargo::rerun-if-env-changed={name}");
            env::var_os(name)
        };
        let (mut folders, mut skipped) = (Vec::new(), Vec::new());
        for root in crate::search_paths::search_roots(variable, (&os, &architecture)) {
            match root {
                Ok(root) => {
                    folders.extend(root.folders.iter().map(|folder| root.root.join(folder)))
                }
                Err(why) => skipped.push(why),
            }
        }
        let archive = folders.iter().map(|folder| folder.join(NAME)).find(|file| file.is_file());
        let archive = archive.ok_or_else(|| {
            let folders = folders.iter().map(|folder| folder.display().to_string());
            let tried = folders.chain(skipped).collect::<Vec<_>>().join(", ");
            format!(
                "{NAME} was not found: {tried}; set CUDA_HOME, or build without the feature: \
                 the program then loads a runtime when it first needs one"
            )
        })?;
        println!("cargo::rerun-if-changed={}", archive.display());
        let bytes = std::fs::read(&archive)
            .map_err(|error| format!("{} cannot be read: {error}", archive.display()))?;
        let symbols = symbols(&bytes)
            .filter(|symbols| symbols.contains("cudaRuntimeGetVersion"))
            .ok_or_else(|| {
            format!("{} is not an archive of the CUDA runtime", archive.display())
        })?;
        let directory = archive.parent().expect("a file is in a directory");
        println!("cargo::rustc-link-search=native={}", directory.display());
        println!("cargo::rustc-link-lib=static=cudart_static");
        for library in ["dl", "rt", "pthread"] {
            println!("cargo::rustc-link-lib=dylib={library}");
        }
        Ok(symbols)
    }

    /// The names in the index of an archive. GNU's index is the first member ("ar(5)").
    fn symbols(archive: &[u8]) -> Option<HashSet<String>> {
        let header = archive.strip_prefix(b"!<arch>\n/ ")?.get(..58)?;
        let size: usize = str::from_utf8(&header[46..56]).ok()?.trim().parse().ok()?;
        let index = archive.get(68..)?.get(..size)?;
        let count = u32::from_be_bytes(index.get(..4)?.try_into().ok()?) as usize;
        let names = index.get(4 + 4 * count..)?;
        Some(
            names
                .split(|byte| *byte == 0)
                .map(|name| String::from_utf8_lossy(name).into())
                .collect(),
        )
    }
}

#[cfg(feature = "bindgen")]
mod generate {
    use std::env;
    use std::path::PathBuf;

    /// Functions of the runtime whose signature is the same in all versions from 12.0 to 13.x.
    const FUNCTIONS: &str = "cuda(\
        DeviceCanAccessPeer|DeviceEnablePeerAccess|\
        DeviceGetAttribute|DeviceGetStreamPriorityRange|DeviceSynchronize|DriverGetVersion|\
        EventCreateWithFlags|EventDestroy|EventElapsedTime|EventQuery|EventRecord|EventSynchronize|\
        Free|FreeAsync|FreeHost|\
        GetDevice|GetDeviceCount|GetDriverEntryPoint|GetDriverEntryPointByVersion|\
        GetErrorName|GetErrorString|GetLastError|GraphDestroy|\
        HostAlloc|HostGetDevicePointer|HostGetFlags|HostRegister|HostUnregister|\
        LaunchHostFunc|Malloc|MallocAsync|MemGetInfo|Memcpy|MemcpyAsync|Memset|MemsetAsync|\
        PeekAtLastError|RuntimeGetVersion|SetDevice|\
        StreamBeginCapture|StreamCreateWithFlags|StreamCreateWithPriority|StreamDestroy|\
        StreamEndCapture|StreamGetFlags|StreamGetPriority|StreamIsCapturing|StreamQuery|\
        StreamSynchronize|StreamWaitEvent|ThreadExchangeStreamCaptureMode)";

    /// Types that no function above names: handles, and the signatures of driver functions that
    /// `cudaGetDriverEntryPoint` returns.
    const TYPES: &str = "cudaError_t|cudaStream_t|cudaEvent_t|cudaDeviceAttr|cudaMemcpyKind|\
        cudaGetDriverEntryPointFlags|CUmemorytype|CUresult|\
        PFN_(cuCtxGetCurrent_v4000|cuCtxPopCurrent_v4000|cuCtxPushCurrent_v4000|cuDeviceGet_v2000|\
        cuDevicePrimaryCtxGetState_v7000|\
        cuDevicePrimaryCtxRelease_v11000|cuDevicePrimaryCtxRetain_v7000|cuLaunchKernel_v4000|\
        cuMemsetD(16|32)Async_v3020|\
        cuModuleGetFunction_v2000|cuModuleLoadData_v2000|cuModuleUnload_v2000|\
        cuEvent(Query|Record|Synchronize)_v2000|cuMemcpy(DtoH|HtoD)Async_v3020|\
        cuPointerGetAttribute_v4000|cuStreamIsCapturing_v10000|cuStreamQuery_v2000|\
        cuGraph(AddKernelNode|ExecKernelNodeSetParams)_v12000|\
        cuGraph(Create|Destroy|ExecDestroy|Launch)_v10000|\
        cuGraphInstantiateWithFlags_v11040|\
        cuThreadExchangeStreamCaptureMode_v10010)";

    const CONSTANTS: &str = "cuda(Event(BlockingSync|Default|DisableTiming)|\
        HostAlloc(Default|Mapped|Portable|WriteCombined)|\
        HostRegister(Default|Mapped|Portable|ReadOnly)|Stream(Default|NonBlocking))|CUDART_VERSION";

    /// A function that is always declared. Headers before 12.5 do not have it.
    const NEWER: (&str, &str) = (
        "cudaGetDriverEntryPointByVersion",
        "pub fn cudaGetDriverEntryPointByVersion(symbol: *const ::std::os::raw::c_char, \
         funcPtr: *mut *mut ::std::os::raw::c_void, cudaVersion: ::std::os::raw::c_uint, \
         flags: ::std::os::raw::c_ulonglong, driverStatus: *mut cudaDriverEntryPointQueryResult) \
         -> cudaError_t;",
    );

    pub fn bindings() {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let out = out.join("bindings.rs");
        if env::var_os("DOCS_RS").is_some() {
            println!("cargo::rerun-if-changed=src/bindings.rs");
            let committed =
                std::fs::read("src/bindings.rs").expect("the package contains the bindings");
            return std::fs::write(out, committed).expect("OUT_DIR is writable");
        }
        let include = include_dir();
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        println!("cargo::rerun-if-env-changed=CUDA_PATH");
        println!("cargo::rerun-if-changed={}", include.display());
        let generated = bindgen::Builder::default()
            .header_contents(
                "cudart.h",
                "#include <cuda_runtime_api.h>\n#include <cudaTypedefs.h>\n",
            )
            .clang_arg(format!("-I{}", include.display()))
            .allowlist_function(FUNCTIONS)
            .allowlist_type(TYPES)
            .allowlist_var(CONSTANTS)
            .default_enum_style(bindgen::EnumVariation::NewType {
                is_bitfield: false,
                is_global: false,
            })
            .prepend_enum_name(false)
            .must_use_type("cudaError")
            .must_use_type("cudaError_enum")
            .generate_comments(false)
            .layout_tests(true)
            .merge_extern_blocks(true)
            .rust_edition(bindgen::RustEdition::Edition2024)
            .rust_target(bindgen::RustTarget::stable(88, 0).expect("a Rust version bindgen knows"))
            .disable_header_comment()
            .raw_line(
                "// Made by bindgen from the CUDA runtime's headers: see ../build.rs. Do not edit.",
            )
            .formatter(bindgen::Formatter::Prettyplease)
            .generate()
            .expect("bindgen could not read the CUDA headers")
            .to_string();
        // The macro `runtime!` turns the declarations into the table that the loader fills.
        const EXTERN: &str = "unsafe extern \"C\" {";
        assert_eq!(generated.matches(EXTERN).count(), 1, "bindgen writes one block of functions");
        let mut functions = String::from("runtime! {");
        if !generated.contains(NEWER.0) {
            functions.push_str(NEWER.1);
        }
        std::fs::write(out, generated.replace(EXTERN, &functions)).expect("OUT_DIR is writable");
    }

    fn include_dir() -> PathBuf {
        let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
            .iter()
            .filter_map(env::var_os)
            .map(|root| PathBuf::from(root).join("include"))
            .collect();
        folders.push("/usr/local/cuda/include".into());
        folders.push("/opt/cuda/include".into());
        let found = folders.iter().find(|folder| folder.join("cuda_runtime_api.h").is_file());
        match found {
            Some(folder) => folder.clone(),
            None => panic!(
                "feature `bindgen` needs cuda_runtime_api.h, which is in none of {folders:?}; \
                 set CUDA_HOME, or build without the feature: the committed bindings work with \
                 every CUDA 12 and 13"
            ),
        }
    }
}
