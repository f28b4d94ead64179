//! Submissions: copy calls in flight, and the members that refer to them.
//!
//! One call moves rows of several members. One event is recorded behind all its copies, so a
//! submission has one [`Record`], as a single buffer's copy has. The record is used again once no
//! member refers to the submission.

use crate::device::Device;
use crate::error::{Result, reserve};
use crate::flight::record::Record;

/// A list of `count` clones of `value`.
pub(super) fn filled<E: Clone>(value: E, count: usize, device: Device) -> Result<Vec<E>> {
    let mut all = Vec::new();
    reserve(&mut all, count, device)?;
    all.resize(count, value);
    Ok(all)
}

/// A table with the number of the newest submission of each member, for one kind of use.
#[derive(Default)]
pub(super) struct NewestSubmissions(Vec<Option<usize>>);

impl NewestSubmissions {
    /// Makes the table of `members` entries, unless it exists.
    pub(super) fn reserve(&mut self, members: usize, device: Device) -> Result<()> {
        if self.0.is_empty() {
            self.0 = filled(None, members, device)?;
        }
        Ok(())
    }

    /// The newest submission of a member. There is none as long as the table does not exist.
    #[inline]
    pub(super) fn of(&self, member: usize) -> Option<usize> {
        *self.0.get(member)?
    }

    /// The entry of a member. The table exists.
    #[inline]
    pub(super) fn of_mut(&mut self, member: usize) -> &mut Option<usize> {
        &mut self.0[member]
    }

    /// The submissions of all members. A submission that moved several members occurs once for
    /// each.
    pub(super) fn all(&self) -> impl Iterator<Item = usize> {
        self.0.iter().flatten().copied()
    }
}

/// The submissions of a group, by their numbers.
pub(super) struct Submissions(Vec<Submission>);

struct Submission {
    record: Record,
    /// The number of entries that refer to it.
    references: usize,
}

impl Submissions {
    pub(super) fn none() -> Submissions {
        Submissions(Vec::new())
    }

    #[inline]
    pub(super) fn record(&self, number: usize) -> &Record {
        &self.0[number].record
    }

    #[inline]
    pub(super) fn record_mut(&mut self, number: usize) -> &mut Record {
        &mut self.0[number].record
    }

    /// The records of all submissions.
    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        self.0.iter().map(|submission| &submission.record)
    }

    /// The number of a submission that no member refers to.
    pub(super) fn unused(&mut self, device: Device) -> Result<usize> {
        let unused = self.0.iter().position(|submission| submission.references == 0);
        match unused {
            Some(number) => Ok(number),
            None => {
                reserve(&mut self.0, 1, device)?;
                self.0.push(Submission { record: Record::idle(), references: 0 });
                Ok(self.0.len() - 1)
            }
        }
    }

    /// Makes an entry of a table refer to submission `number`. The submission that it referred to
    /// is superseded if that was the last reference.
    pub(super) fn refer(&mut self, entry: &mut Option<usize>, number: usize) {
        self.0[number].references += 1;
        if let Some(before) = entry.replace(number) {
            let before = &mut self.0[before];
            before.references -= 1;
            if before.references == 0 {
                before.record.supersede();
            }
        }
    }
}
