//! A file that several readers read at any position, through the page cache or past it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// Offsets, lengths and addresses of reads past the page cache are multiples of this, in bytes.
pub const ALIGNMENT: usize = 4096;

/// An open file.
pub struct Source {
    path: PathBuf,
    file: File,
    len: u64,
    modified: Option<SystemTime>,
    /// The file for reads past the page cache.
    direct: Option<File>,
    /// The reason why the file system refuses such reads.
    refused: OnceLock<io::Error>,
}

impl Source {
    /// Opens a regular file, to read past the page cache if `direct`.
    ///
    /// If the file system refuses that, reads go through the page cache, and
    /// [`refused`](Self::refused) returns the reason.
    pub fn open(path: &Path, direct: bool) -> io::Result<Source> {
        let named = |error: io::Error| named(path, error);
        // The kind comes first, since opening a FIFO waits for a writer.
        if !std::fs::metadata(path).map_err(named)?.is_file() {
            return Err(named(io::Error::other("it is not a regular file")));
        }
        let file = File::open(path).map_err(named)?;
        let metadata = file.metadata().map_err(named)?;
        let mut source = Source {
            path: path.into(),
            file,
            len: metadata.len(),
            modified: metadata.modified().ok(),
            direct: None,
            refused: OnceLock::new(),
        };
        if direct {
            match open_direct(path) {
                Ok(file) => source.direct = Some(file),
                Err(error) => drop(source.refused.set(error)),
            }
        }
        Ok(source)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length when the file was opened, in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The reason why reads go through the page cache though they were to go past it.
    pub fn refused(&self) -> Option<&io::Error> {
        self.refused.get()
    }

    /// Reads at least `need` bytes from `at` on into the beginning of `into`.
    ///
    /// Interrupted and short reads are tried again. A read past the page cache takes a multiple of
    /// [`ALIGNMENT`], so it uses all of `into`, and the bytes after `need` may change.
    ///
    /// # Errors
    ///
    /// If a read fails, or the file ends before `at + need`. The error names the file.
    pub fn read(&self, at: u64, into: &mut [u8], need: usize) -> io::Result<()> {
        let mut filled = 0;
        while filled < need {
            let at = at + filled as u64;
            let direct = self.direct.as_ref().filter(|_| {
                let rest = &into[filled..];
                let aligned = at | rest.as_ptr().addr() as u64 | rest.len() as u64;
                aligned.is_multiple_of(ALIGNMENT as u64) && self.refused.get().is_none()
            });
            let read = match direct {
                Some(file) => read_at(file, at, &mut into[filled..]),
                None => read_at(&self.file, at, &mut into[filled..need]),
            };
            match read {
                Ok(0) => {
                    let end = format!("it ends at byte {at}, and had {} bytes", self.len);
                    return Err(named(
                        &self.path,
                        io::Error::new(io::ErrorKind::UnexpectedEof, end),
                    ));
                }
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Some file systems open the file so, and refuse the read.
                Err(error) if direct.is_some() && error.kind() == io::ErrorKind::InvalidInput => {
                    let _ = self.refused.set(error);
                }
                Err(error) => return Err(named(&self.path, error)),
            }
        }
        Ok(())
    }

    /// An error if the file was written since it was opened.
    pub fn check_unchanged(&self) -> io::Result<()> {
        let now = self.file.metadata().map_err(|error| named(&self.path, error))?;
        if now.len() != self.len || now.modified().ok() != self.modified {
            return Err(named(&self.path, io::Error::other("it changed while it was read")));
        }
        Ok(())
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_path: &Path) -> io::Result<File> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this example does so on Linux alone"))
}

#[cfg(unix)]
fn read_at(file: &File, at: u64, into: &mut [u8]) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, at)
}

#[cfg(windows)]
fn read_at(file: &File, at: u64, into: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, into, at)
}
