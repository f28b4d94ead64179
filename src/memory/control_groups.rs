//! The memory limits of this process's control groups.
//!
//! The kernel kills a process that exceeds a limit of its group. `/proc/meminfo` is about the whole
//! machine and does not show these limits. This module reads the limit and the use of each group,
//! from the process's own group up to the root that the process sees. It reads both versions
//! ("Control Group v2" and "Memory Resource Controller" in the kernel's documentation).
//! `memory.high` is ignored: a group above it is slowed down, not killed.
//!
//! The use of a group includes page cache and reclaimable slabs. The kernel takes these back before
//! it kills, so they are subtracted, as the kernel does for `MemAvailable`.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::device::MemoryInfo;

/// The limits of this process's groups, from its own up to the root that it sees.
///
/// `free` of a limit is the room that it leaves, and `total` is the limit. `root` stands for `/`.
pub(crate) fn limits(root: &Path, machine: MemoryInfo) -> impl Iterator<Item = MemoryInfo> {
    group(root).into_iter().flat_map(move |group| {
        let levels: Vec<_> = group.path.ancestors().map(|level| group.mount.join(level)).collect();
        levels.into_iter().filter_map(move |level| group.version.limit(&level, machine))
    })
}

/// The version of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// The limit of one group, and the room that it leaves. `None` if the machine cannot reach it.
    fn limit(self, group: &Path, machine: MemoryInfo) -> Option<MemoryInfo> {
        let (limit, used, prefix) = match self {
            Version::One => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            Version::Two => ("memory.max", "memory.current", ""),
        };
        let read = |name: &str| fs::read_to_string(group.join(name)).ok();
        // Without a limit, version 2 has "max", and version 1 a number that no machine reaches.
        let total: usize = read(limit)?.trim().parse().ok()?;
        if total >= machine.total {
            return None;
        }
        let used: usize = read(used)?.trim().parse().ok()?;
        let free = total.saturating_sub(used);
        // The kernel computes `memory.stat` when it is read, so it is read only if it matters.
        if free >= machine.free {
            return Some(MemoryInfo { free, total });
        }
        let table = read("memory.stat").unwrap_or_default();
        let cached = |name: &str| -> usize {
            let value = table
                .lines()
                .find_map(|line| line.strip_prefix(prefix)?.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
        };
        let cached = ["inactive_file", "active_file", "slab_reclaimable"]
            .into_iter()
            .fold(0, |sum: usize, name| sum.saturating_add(cached(name)));
        Some(MemoryInfo { free: total.saturating_sub(used.saturating_sub(cached)), total })
    }
}

/// This process's group in the hierarchy that controls memory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    version: Version,
    /// The folder of the topmost group that this process sees.
    mount: PathBuf,
    /// The folder of this process's group, relative to `mount`.
    path: PathBuf,
}

fn group(root: &Path) -> Option<Group> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    // A machine may mount both versions. One of them has the memory controller.
    [Version::One, Version::Two].into_iter().find_map(|version| {
        let path = path_of(&groups, version)?;
        let (inner, mount) = mount_of(&mounts, version, path)?;
        // The mount may show a part of the hierarchy. The process does not see groups outside it.
        let path = Path::new(path).strip_prefix(&inner).unwrap_or(Path::new(""));
        let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
        let path = if inside { path } else { Path::new("") };
        let mount = root.join(mount.strip_prefix("/").ok()?);
        Some(Group { version, mount, path: path.into() })
    })
}

/// The path of this process's group, from the text of `/proc/self/cgroup`.
///
/// Each line is `number:controllers:path`.
fn path_of(groups: &str, version: Version) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let found = match version {
            Version::One => controllers.split(',').any(|name| name == "memory"),
            Version::Two => number == "0" && controllers.is_empty(),
        };
        found.then(|| path.strip_prefix('/')).flatten()
    })
}

/// The mount of the groups, from the text of `/proc/self/mountinfo`.
///
/// Returns the group at the root of the mount, without its first slash, and the mount point. The
/// first mount that contains `path` is preferred.
fn mount_of(mounts: &str, version: Version, path: &str) -> Option<(PathBuf, PathBuf)> {
    let found = mounts.lines().filter_map(|line| {
        // Fields of the mount, some optional, stand before " - ". The file system's follow.
        let (mount, system) = line.split_once(" - ")?;
        let (mut mount, mut system) = (mount.split(' '), system.split(' '));
        let (inner, point) = (mount.nth(3)?, mount.next()?);
        let (kind, _source, options) = (system.next()?, system.next()?, system.next()?);
        let found = match version {
            Version::One => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
            Version::Two => kind == "cgroup2",
        };
        let inner = unescaped(inner);
        found.then(|| (inner.strip_prefix('/').unwrap_or(&inner).into(), unescaped(point).into()))
    });
    let mut found: Vec<(PathBuf, PathBuf)> = found.collect();
    let fits = found.iter().position(|(inner, _)| Path::new(path).starts_with(inner));
    (!found.is_empty()).then(|| found.swap_remove(fits.unwrap_or(0)))
}

/// A field of `mountinfo` without its escapes.
///
/// The kernel writes white space and backslashes as a backslash with three octal digits.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = String::from(parts.next().unwrap_or_default());
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                text.push(code.into());
                text.push_str(&part[3..]);
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_read() {
        assert_eq!(unescaped("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescaped("/a\\9b\\"), "/a\\9b\\");
        assert_eq!(unescaped("/ä\\ä€"), "/ä\\ä€");
    }
}
