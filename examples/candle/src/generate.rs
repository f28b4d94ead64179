//! Files to load.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::loader::Failure;

/// Writes a model's weights, bf16 and f32, in shards.
pub fn files(folder: &Path, gigabytes: f64, shards: usize) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)?;
    let each = gigabytes * 1e9 / shards as f64;
    for shard in 0..shards {
        let (mut tensors, mut bytes, mut layer) = (BTreeMap::new(), 0.0, 0);
        while bytes < each {
            for (name, shape, dtype) in [
                ("attention.qkv", vec![12288, 4096], DType::BF16),
                ("attention.out", vec![4096, 4096], DType::BF16),
                ("norm", vec![4096], DType::F32),
                ("router", vec![64, 4096], DType::F32),
            ] {
                // A small file has small tensors.
                let shape: Vec<usize> =
                    shape.iter().map(|n| if each < 1e9 { n / 32 } else { *n }).collect();
                let tensor = Tensor::rand(-1f32, 1f32, shape, &Device::Cpu)?.to_dtype(dtype)?;
                bytes += (tensor.elem_count() * dtype.size_in_bytes()) as f64;
                tensors.insert(format!("{shard}.{layer}.{name}"), tensor);
            }
            layer += 1;
        }
        let path = folder.join(format!("model-{:05}-of-{shards:05}.safetensors", shard + 1));
        let tensors: std::collections::HashMap<_, _> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, &path)?;
        println!("{}", path.display());
    }
    Ok(())
}
