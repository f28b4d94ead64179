//! Devices and element types as text, for `serde`. Options derive their form.

use std::fmt::Display;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};

use crate::device::Device;
use crate::element::DType;

/// Reads a value from its text.
fn parse<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr<Err: Display>,
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(D::Error::custom)
}

impl Serialize for Device {
    /// As text: `"cpu"`, `"cuda:0"`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    /// From a text that `FromStr` takes. `"auto"` asks for the devices of this machine.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Device, D::Error> {
        parse(deserializer)
    }
}

impl Serialize for DType {
    /// As its [`name`](DType::name).
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for DType {
    /// From its [`name`](DType::name).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        parse(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use crate::{
        BufferOptions, DType, Device, HostFlags, Pinning, PoolGrowth, PoolOptions, StreamFlags,
        StreamOptions, WaitPolicy,
    };

    /// Writes a value, compares the text, and reads it again.
    #[track_caller]
    fn check<T>(value: T, text: &str)
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_string(&value).unwrap(), text);
        assert_eq!(serde_json::from_str::<T>(text).unwrap(), value);
    }

    #[test]
    fn what_is_serialized_is_the_same_after_it_is_read() {
        check(Device::Cpu, r#""cpu""#);
        check(Device::Cuda(3), r#""cuda:3""#);
        check(DType::BF16, r#""bf16""#);
        check(HostFlags::PORTABLE | HostFlags::MAPPED, r#""PORTABLE | MAPPED""#);
        let buffer = BufferOptions { pinning: Pinning::Required, host_flags: HostFlags::MAPPED };
        check(buffer, r#"{"pinning":"required","host_flags":"MAPPED"}"#);
        let growth = PoolGrowth::By(NonZeroUsize::new(4).unwrap());
        let pool = PoolOptions { max_buffers: Some(8), growth, zeroed: true, ..Default::default() };
        check(
            pool,
            r#"{"max_buffers":8,"growth":{"by":4},"pinning":"preferred","host_flags":"PORTABLE | MAPPED","zeroed":true}"#,
        );
        let flags = StreamFlags::empty();
        let stream = StreamOptions { priority: -5, flags, wait: WaitPolicy::Block };
        check(stream, r#"{"priority":-5,"flags":"","wait":"block"}"#);
    }

    #[test]
    fn missing_fields_have_their_defaults() {
        assert_eq!(serde_json::from_str::<BufferOptions>("{}").unwrap(), Default::default());
        assert_eq!(serde_json::from_str::<StreamOptions>("{}").unwrap(), Default::default());
        let pool: PoolOptions = serde_json::from_str(r#"{"max_buffers": 3}"#).unwrap();
        assert_eq!(pool, PoolOptions { max_buffers: Some(3), ..Default::default() });
    }

    #[test]
    fn a_text_that_names_nothing_is_an_error_that_says_so() {
        let device = serde_json::from_str::<Device>(r#""gpu""#).unwrap_err().to_string();
        assert!(device.contains("expected \"cpu\""), "{device}");
        let dtype = serde_json::from_str::<DType>(r#""float""#).unwrap_err().to_string();
        assert!(dtype.contains("no element type"), "{dtype}");
    }
}
