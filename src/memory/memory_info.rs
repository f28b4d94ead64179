//! Free and total memory: of a CUDA device, or of this machine within its control groups' limits.

use std::fs;
use std::path::Path;

use crate::cuda::calls;
use crate::cuda::devices::context;
use crate::device::{Device, MemoryInfo};
use crate::error::{Error, Result};
use crate::memory::control_groups::limits;

impl Device {
    /// Free and total memory of the CUDA device, or of this machine, in bytes.
    ///
    /// In a container, the limits of its control groups bound the machine's memory. Page cache that
    /// the kernel can take back counts as free. Swap space does not count.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] if the CUDA device cannot be used. For the CPU, if the operating
    /// system does not report its memory.
    ///
    /// ```
    /// # #[cfg(target_os = "linux")] {
    /// let memory = cpu_gpu_buffer::Device::Cpu.memory()?;
    /// assert!(memory.free <= memory.total);
    /// # }
    /// # Ok::<(), cpu_gpu_buffer::Error>(())
    /// ```
    pub fn memory(self) -> Result<MemoryInfo> {
        match self {
            Device::Cpu => host_memory().ok_or_else(|| Error::Unavailable {
                reason: "this system does not say how much memory it has".into(),
            }),
            Device::Cuda(ordinal) => {
                let _current = context(ordinal)?.enter()?;
                let (free, total) = calls::context::memory_info()?;
                Ok(MemoryInfo { free, total })
            }
        }
    }
}

/// The machine's memory that this process can use now, and at most. Reads about ten small files.
///
/// `None` if there is no `/proc/meminfo`.
fn host_memory() -> Option<MemoryInfo> {
    memory_under(Path::new("/"))
}

/// The bytes that this process can still use within the limits of its control groups.
///
/// `None` if there is no limit. Beyond a limit, the kernel kills the process.
pub(crate) fn room_in_groups() -> Option<usize> {
    let root = Path::new("/");
    let machine = MemoryInfo { free: usize::MAX, ..of_machine(root)? };
    limits(root, machine).map(|limit| limit.free).min()
}

/// [`host_memory`] with `root` in place of `/`.
fn memory_under(root: &Path) -> Option<MemoryInfo> {
    let machine = of_machine(root)?;
    Some(limits(root, machine).fold(machine, |memory, limit| MemoryInfo {
        free: memory.free.min(limit.free),
        total: memory.total.min(limit.total),
    }))
}

/// `MemAvailable` and `MemTotal` of `/proc/meminfo`: available without swapping, and in total.
fn of_machine(root: &Path) -> Option<MemoryInfo> {
    let table = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let bytes = |name: &str| {
        let line = table.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kilobytes.checked_mul(1024)
    };
    Some(MemoryInfo { free: bytes("MemAvailable:")?, total: bytes("MemTotal:")? })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const GB: usize = 1 << 30;

    /// A folder of files that describe a machine with 64 GB, 48 of them free.
    struct Machine(PathBuf);

    impl Machine {
        fn new(test: &str) -> Machine {
            let root = std::env::temp_dir().join(format!("cgb-{test}-{}", std::process::id()));
            let machine = Machine(root);
            let table = format!("MemTotal: {} kB\nMemAvailable:   {} kB\n", 64 << 20, 48 << 20);
            machine.put("proc/meminfo", &table);
            machine
        }

        fn put(&self, file: &str, text: &str) {
            let path = self.0.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn process(&self, groups: &str, mounts: &str) {
            self.put("proc/self/cgroup", groups);
            self.put("proc/self/mountinfo", mounts);
        }

        /// Writes the files of a group of version 2. `limit` may be "max". `used` includes `cache`.
        fn limit(&self, group: &str, limit: &str, used: usize, cache: usize) {
            let group = format!("sys/fs/cgroup/{group}");
            self.put(&format!("{group}/memory.max"), &format!("{limit}\n"));
            self.put(&format!("{group}/memory.current"), &format!("{used}\n"));
            let (one, other) = (cache / 4, cache - cache / 4);
            let stat = format!("anon 7\nfile {cache}\ninactive_file {one}\nactive_file {other}\n");
            self.put(&format!("{group}/memory.stat"), &stat);
        }

        /// Checks free and total memory, in GB.
        #[track_caller]
        fn has(&self, free: usize, total: usize) {
            let memory = memory_under(&self.0).unwrap();
            assert_eq!(memory, MemoryInfo { free: free * GB, total: total * GB });
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const V2: &str =
        "29 23 0:26 / /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n";

    #[test]
    fn without_groups_there_is_what_the_machine_has() {
        let machine = Machine::new("no-groups");
        machine.has(48, 64);
        machine.process("", "");
        machine.has(48, 64);
        machine.process("0::/\n", V2);
        machine.has(48, 64);
        fs::remove_file(machine.0.join("proc/meminfo")).unwrap();
        assert_eq!(memory_under(&machine.0), None);
    }

    #[test]
    fn a_container_has_what_its_limit_leaves_and_page_cache_is_free() {
        let machine = Machine::new("container");
        // The process sees its own group alone.
        machine.process("0::/\n", V2);
        machine.limit("", &(8 * GB).to_string(), 5 * GB, 0);
        machine.has(3, 8);
        machine.limit("", &(8 * GB).to_string(), 7 * GB, 4 * GB);
        machine.has(5, 8);
        // After a limit is lowered, the use may exceed it for a moment.
        machine.limit("", &(8 * GB).to_string(), 9 * GB, 0);
        machine.has(0, 8);
        machine.limit("", "max", 9 * GB, 0);
        machine.has(48, 64);
        // A limit above the machine's memory has no effect.
        machine.limit("", &(999 * GB).to_string(), 9 * GB, 0);
        machine.has(48, 64);
    }

    #[test]
    fn the_lowest_limit_on_the_way_to_the_root_counts() {
        let machine = Machine::new("levels");
        machine.process("0::/pod.slice/box.scope/own\n", V2);
        machine.limit("pod.slice/box.scope/own", "max", GB, 0);
        machine.limit("pod.slice/box.scope", &(16 * GB).to_string(), 2 * GB, 0);
        machine.has(14, 16);
        // The pod has other containers, and less is free within its limit.
        machine.limit("pod.slice", &(32 * GB).to_string(), 30 * GB, 0);
        machine.has(2, 16);
        machine.limit("pod.slice/box.scope/own", &(4 * GB).to_string(), GB, 0);
        machine.has(2, 4);
        // A sibling's limit does not apply.
        machine.limit("pod.slice/other", &GB.to_string(), 0, 0);
        machine.has(2, 4);
    }

    #[test]
    fn a_mount_may_begin_below_the_root_and_a_path_may_lead_out_of_it() {
        let machine = Machine::new("below");
        let below = V2.replace(" / /sys", " /docker/ab /sys");
        machine.limit("own", &(2 * GB).to_string(), GB, 0);
        machine.limit("", &(8 * GB).to_string(), 3 * GB, 0);
        machine.process("0::/docker/ab/own\n", &below);
        machine.has(1, 2);
        for outside in ["0::/../other\n", "0::/docker/xy/own\n"] {
            machine.process(outside, &below);
            machine.has(5, 8);
        }
        // A folder outside the mount is no group.
        machine.limit("../own", &GB.to_string(), 0, 0);
        machine.process("0::/../own\n", V2);
        machine.has(5, 8);
    }

    #[test]
    fn version_one_is_read_where_it_has_the_controller() {
        let machine = Machine::new("one");
        let groups = "5:cpu,cpuacct:/a:b\n4:hugetlb,memory:/a:b\n1:name=memory:/x\n0::/y\n";
        let mounts = "30 22 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            31 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:29 / /sys/fs/cgroup/me\\040mory rw shared:9 - cgroup cgroup rw,hugetlb,memory\n\
            33 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        machine.process(groups, mounts);
        let put = |group: &str, limit: usize, used: usize, cache: usize| {
            let group = format!("sys/fs/cgroup/me mory/{group}");
            machine.put(&format!("{group}/memory.limit_in_bytes"), &format!("{limit}\n"));
            machine.put(&format!("{group}/memory.usage_in_bytes"), &format!("{used}\n"));
            // Without the prefix, a line is about the group without its children.
            let stat =
                format!("inactive_file 5\ntotal_inactive_file {cache}\ntotal_active_file 0\n");
            machine.put(&format!("{group}/memory.stat"), &stat);
        };
        put("", 0x7fff_ffff_ffff_f000, 60 * GB, 0);
        machine.has(48, 64);
        put("a:b", 10 * GB, 9 * GB, 2 * GB);
        machine.has(3, 10);
    }
}
