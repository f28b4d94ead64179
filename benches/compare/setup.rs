//! The setup of a run: its device, the other libraries, and the amount of work.

use cpu_gpu_buffer::Device;

use crate::peer::Peer;
use crate::raw;

pub struct Setup {
    pub device: Device,
    /// True if sizes and rounds shrink to a check of the program.
    pub short: bool,
    pub cudarc: Option<Peer>,
}

impl Setup {
    /// Returns the setup of a device, and a text for each missing contender.
    pub fn new(device: Device, short: bool) -> (Setup, Vec<String>) {
        let Device::Cuda(ordinal) = device else {
            let left_out =
                "cpu: without CUDA there are no raw calls and no cudarc, and the run is short";
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

    /// The rounds of this run if a full run has `whole` rounds.
    pub fn rounds(&self, whole: usize) -> usize {
        if self.short { (whole / 50).clamp(3, 5) } else { whole }
    }

    /// Those of the sizes that a run takes.
    pub fn sizes<'a>(&self, whole: &'a [usize]) -> impl Iterator<Item = usize> + use<'a> {
        let most = if self.short { 1 << 20 } else { usize::MAX };
        whole.iter().copied().filter(move |bytes| *bytes <= most)
    }

    /// Checks that the device and the pinned memory have enough space. Returns the reason if not.
    pub fn room(&self, of_device: usize, of_host: usize) -> Result<(), String> {
        for (device, bytes) in [(self.device, of_device), (Device::Cpu, of_host)] {
            let free = device.memory().map_or(usize::MAX, |memory| memory.free);
            // A tenth stays free for other programs.
            if bytes > free / 10 * 9 {
                return Err(format!("{device} has {} MB free", free >> 20));
            }
        }
        Ok(())
    }
}
