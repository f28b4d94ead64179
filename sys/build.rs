//! Regenerates the bindings when the feature `bindgen` asks for it; otherwise the committed ones serve
//! and nothing happens here.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "bindgen")]
    generate::bindings();
}

#[cfg(feature = "bindgen")]
mod generate {
    use std::env;
    use std::path::PathBuf;

    /// Functions of the runtime: those whose signature is the same wherever they exist from 12.0 to 13.x.
    const FUNCTIONS: &str = "cuda(\
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

    /// Types that no function above names: handles, and the signatures of the driver's own functions, which
    /// come through `cudaGetDriverEntryPoint`.
    const TYPES: &str = "cudaError_t|cudaStream_t|cudaEvent_t|cudaDeviceAttr|cudaMemcpyKind|cudaGetDriverEntryPointFlags|CUresult|\
        PFN_(cuCtxGetCurrent_v4000|cuCtxPopCurrent_v4000|cuCtxPushCurrent_v4000|cuDeviceGet_v2000|\
        cuDevicePrimaryCtxGetState_v7000|\
        cuDevicePrimaryCtxRelease_v11000|cuDevicePrimaryCtxRetain_v7000|cuLaunchKernel_v4000|cuMemsetD(16|32)Async_v3020|\
        cuModuleGetFunction_v2000|cuModuleLoadData_v2000|cuModuleUnload_v2000|\
        cuEvent(Query|Record|Synchronize)_v2000|cuMemcpy(DtoH|HtoD)Async_v3020|cuStreamIsCapturing_v10000|\
        cuGraph(AddKernelNode|ExecKernelNodeSetParams)_v12000|cuGraph(Create|Destroy|ExecDestroy|Launch)_v10000|\
        cuGraphInstantiateWithFlags_v11040|\
        cuThreadExchangeStreamCaptureMode_v10010)";

    const CONSTANTS: &str = "cuda(Event(BlockingSync|Default|DisableTiming)|\
        HostAlloc(Default|Mapped|Portable|WriteCombined)|\
        HostRegister(Default|Mapped|Portable)|Stream(Default|NonBlocking))|CUDART_VERSION";

    /// Declared for the loader whatever the headers are: headers before 12.5 do not have it.
    const NEWER: (&str, &str) = (
        "cudaGetDriverEntryPointByVersion",
        "pub fn cudaGetDriverEntryPointByVersion(symbol: *const ::std::os::raw::c_char, \
         funcPtr: *mut *mut ::std::os::raw::c_void, cudaVersion: ::std::os::raw::c_uint, \
         flags: ::std::os::raw::c_ulonglong, driverStatus: *mut cudaDriverEntryPointQueryResult) \
         -> cudaError_t;",
    );

    pub fn bindings() {
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
        // The declarations of functions become the table that the loader fills: see `runtime!`.
        const EXTERN: &str = "unsafe extern \"C\" {";
        assert_eq!(
            generated.matches(EXTERN).count(),
            1,
            "bindgen is expected to write one block of functions"
        );
        let mut functions = String::from("runtime! {");
        if !generated.contains(NEWER.0) {
            functions.push_str(NEWER.1);
        }
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        std::fs::write(out.join("bindings.rs"), generated.replace(EXTERN, &functions))
            .expect("OUT_DIR is writable");
    }

    fn include_dir() -> PathBuf {
        let mut places: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
            .iter()
            .filter_map(env::var_os)
            .map(|root| PathBuf::from(root).join("include"))
            .collect();
        places.push("/usr/local/cuda/include".into());
        places.push("/opt/cuda/include".into());
        let found = places.iter().find(|place| place.join("cuda_runtime_api.h").is_file());
        match found {
            Some(place) => place.clone(),
            None => panic!(
                "feature `bindgen` needs cuda_runtime_api.h, which is in none of {places:?}; \
                 set CUDA_HOME, or build without the feature: the committed bindings serve every CUDA 12 and 13"
            ),
        }
    }
}
