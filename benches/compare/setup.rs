//! What a run has: a device, the peers that work on it, and how much is to be done.

use cpu_gpu_buffer::Device;

use crate::peer::Peer;
use crate::raw;

pub struct Setup {
    pub device: Device,
    /// Whether sizes and rounds are cut down to what a check of the program needs.
    pub short: bool,
    pub cudarc: Option<Peer>,
}

impl Setup {
    /// What there is on a device, and in words what there is not.
    pub fn new(device: Device, short: bool) -> (Setup, Vec<String>) {
        let Device::Cuda(ordinal) = device else {
            let left_out = "cpu: there is no CUDA, hence neither raw calls nor cudarc, and the run is a short one";
            return (Setup { device, short: true, cudarc: None }, vec![left_out.into()]);
        };
        raw::set_device(ordinal);
        match Peer::new(ordinal) {
            Ok(peer) => (Setup { device, short, cudarc: Some(peer) }, Vec::new()),
            Err(why) => (Setup { device, short, cudarc: None }, vec![format!("cudarc: {why}")]),
        }
    }

    pub fn is_cuda(&self) -> bool {
        self.device != Device::Cpu
    }

    /// How many rounds where a whole run has so many.
    pub fn rounds(&self, whole: usize) -> usize {
        if self.short { (whole / 50).clamp(3, 5) } else { whole }
    }

    /// Those of the sizes that a run takes.
    pub fn sizes<'a>(&self, whole: &'a [usize]) -> impl Iterator<Item = usize> + use<'a> {
        let most = if self.short { 1 << 20 } else { usize::MAX };
        whole.iter().copied().filter(move |bytes| *bytes <= most)
    }

    /// Whether so many bytes can be had of the device and, pinned, of this machine, and the reason if not.
    pub fn room(&self, of_device: usize, of_host: usize) -> Result<(), String> {
        for (device, bytes) in [(self.device, of_device), (Device::Cpu, of_host)] {
            let free = device.memory().map_or(usize::MAX, |memory| memory.free);
            // A tenth is left to others.
            if bytes > free / 10 * 9 {
                return Err(format!("{device} has {} MB free", free >> 20));
            }
        }
        Ok(())
    }
}
