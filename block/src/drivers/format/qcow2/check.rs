//! Checking an image and repairing it, on its file alone: no driver runs.
//!
//! The counts are those of `qemu-img check`: references are counted (`survey`), compared with the refcounts on disk (`blocks`), and
//! then the copied flags with the refcounts (`flags`).
//!
//! A repair makes an image no worse wherever it is cut off. References that go away do so before their counts; a flag that
//! allows overwriting is set after the count that it rests on is on disk; what is new (`rebuild`, a new snapshot table) is counted and on
//! disk before the header names it; the bits that call the image dirty or corrupt are cleared last. Nothing is written into a cluster
//! that something else uses, too: what is wrong there stays, and is told.

mod bitmaps;
mod blocks;
mod counters;
mod file;
mod flags;
mod rebuild;
mod report;
mod snapshots;
mod survey;
mod tables;

use std::ops::Range;

use stord_aio::Errno;
use stord_qmp::Error;

pub use self::report::{Repair, Report};

use self::blocks::{Blocks, Comparison};
use self::file::ImageFile;
use self::flags::{Flags, write_changes};
use self::rebuild::{Space, rebuild};
use self::report::CheckError;
use self::snapshots::SnapshotTable;
use self::survey::{Subject, Survey};
use super::header::Header;
use super::layout::{Autoclear, Incompatible};
use crate::backend::Backend;
use crate::driver::FILE;
use crate::graph::Children;

/// Checks the image in a file, and repairs what `repair` allows. Needs a node of the file alone, not of the image; to be called on an
/// I/O context.
///
/// # Errors
/// The file holds no image that can be checked, or reading or writing failed.
pub async fn check(file: &Backend, repair: Repair) -> Result<Report, Error> {
    // One request for all of it: nothing changes in the graph until the end.
    let request = file
        .start()
        .await
        .map_err(|errno| Error::os("Could not check the image", errno))?;
    let children = Children::new(&["file"]);
    if let Some(edge) = children.edges().get(usize::from(FILE.0)) {
        edge.set_node(Some(request.node.clone()));
    }
    check_children(&children, repair).await
}

/// Repairs an image whose dirty bit says that its refcounts may be wrong, before it is written to.
///
/// # Errors
/// The refcounts cannot be made right. Other damage may stay: as in the reference, it does not keep the image from being used.
pub(super) async fn repair_dirty(children: &Children) -> Result<(), Error> {
    let failed = |reason: String| Error::generic(format!("Could not repair dirty image: {reason}"));
    let report = check_children(children, Repair::All)
        .await
        .map_err(|error| failed(error.message.clone()).with_source(error))?;
    if report.check_errors > 0 {
        return Err(failed(Error::reason(&Errno::EIO.into())));
    }
    if report.corruptions > 0 {
        tracing::warn!(
            "qcow2: {} errors are left in an image that was not closed properly",
            report.corruptions
        );
    }
    Ok(())
}

pub(super) async fn check_children(children: &Children, repair: Repair) -> Result<Report, Error> {
    let header = Header::read_for_check(children).await?;
    let mut check = Check {
        file: ImageFile::new(children.clone()),
        header,
        repair,
    };
    let first = check.run().await?;
    if first.corruptions_fixed == 0 && first.leaks_fixed == 0 {
        return Ok(first);
    }
    check.repair = Repair::Nothing;
    let mut second = check.run().await?;
    second.corruptions_fixed = first.corruptions_fixed;
    second.leaks_fixed = first.leaks_fixed;
    second.notes = first.notes;
    second.notes_omitted = first.notes_omitted;
    Ok(second)
}

/// A check under way.
struct Check {
    file: ImageFile,
    header: Header,
    repair: Repair,
}

impl Check {
    fn repairs_all(&self) -> bool {
        self.repair == Repair::All
    }

    async fn run(&mut self) -> Result<Report, CheckError> {
        if self.repair != Repair::Nothing {
            self.drop_unknown_autoclear().await?;
        }
        let snapshots = SnapshotTable::read(&self.file, &self.header, self.repairs_all()).await?;
        if snapshots.overhanging > 0 {
            self.header.raw.nb_snapshots = snapshots.count().into();
            self.file.write_header(&self.header).await?;
        }
        let (mut survey, comparison) = self.check_refcounts(&snapshots).await?;
        self.flush().await?;
        self.check_flags(&snapshots, &mut survey, &comparison)
            .await?;
        let end = comparison.highest + 1;
        survey.report.image_end_offset = end << survey.geometry.cluster_bits;
        survey.report.corruptions += snapshots.incomplete + snapshots.too_long;
        survey.report.corruptions_fixed += snapshots.overhanging;
        if snapshots.is_damaged() {
            let count = snapshots.incomplete + snapshots.too_long;
            survey
                .notes
                .add(|| format!("{count} entries of the snapshot table are incomplete"));
            if self.repairs_all() {
                self.mend_snapshots(&snapshots, &mut survey).await?;
                survey.report.corruptions -= count;
                survey.report.corruptions_fixed += count;
            }
        }
        self.finish(&survey.report, &comparison).await?;
        let mut report = survey.report;
        survey.notes.file(&mut report);
        Ok(report)
    }

    async fn flush(&self) -> Result<(), CheckError> {
        if self.repair == Repair::Nothing {
            return Ok(());
        }
        self.file.flush().await.map_err(CheckError::Flush)
    }

    /// Features that nobody here knows of are off once the image changes.
    async fn drop_unknown_autoclear(&mut self) -> Result<(), CheckError> {
        let bits = self.header.raw.autoclear.get();
        let known = bits & Autoclear::all().bits();
        if bits == known {
            return Ok(());
        }
        self.header.raw.autoclear = known.into();
        self.file.write_header(&self.header).await
    }

    async fn read_reftable(&self) -> Result<Vec<u64>, CheckError> {
        let raw = &self.header.raw;
        let offset = raw.refcount_table_offset.get();
        let bytes =
            u64::from(raw.refcount_table_clusters.get()) << self.header.geometry.cluster_bits;
        self.file
            .read_table(offset, bytes / 8)
            .await
            .map_err(|errno| CheckError::read("the refcount table", offset, errno))
    }

    async fn survey(
        &self,
        snapshots: &SnapshotTable,
        reftable: &[u64],
        repairs_all: bool,
    ) -> Result<Survey, CheckError> {
        Survey::make(Subject {
            file: &self.file,
            header: &self.header,
            snapshots,
            reftable,
            repairs_all,
        })
        .await
    }

    /// Compares references and refcounts and repairs what is wrong.
    async fn check_refcounts(
        &mut self,
        snapshots: &SnapshotTable,
    ) -> Result<(Survey, Comparison), CheckError> {
        let reftable = self.read_reftable().await?;
        let mut survey = self
            .survey(snapshots, &reftable, self.repairs_all())
            .await?;
        if !survey.tables_to_mend.is_empty() {
            self.mend_tables(&mut survey).await?;
        }
        let geometry = survey.geometry;
        let blocks = Blocks::new(&self.file, geometry, &reftable);
        let found = blocks.compare(&mut survey, Repair::Nothing).await?;
        let wrong = |report: &Report| report.corruptions + report.leaks > 0;
        let before = survey.report.clone();
        add(&mut survey.report, &found);
        if !survey.rebuild && !found.rebuild {
            if self.repair == Repair::Nothing || !wrong(&survey.report) {
                return Ok((survey, found));
            }
            survey.report = before;
            // What was found has been told.
            let notes = std::mem::take(&mut survey.notes);
            let fixed = blocks.compare(&mut survey, self.repair).await?;
            survey.notes = notes;
            add(&mut survey.report, &fixed);
            return Ok((survey, fixed));
        }
        if self.repairs_all() {
            return self.rebuild(snapshots, survey, &reftable).await;
        }
        if self.repair == Repair::Leaks {
            // What is left of the check changes nothing.
            self.repair = Repair::Nothing;
            survey.report.check_errors += 1;
            let text = "the refcounts have to be made anew, which is more than to repair leaks";
            survey.notes.insist(text.to_owned());
        }
        Ok((survey, found))
    }

    /// Makes the refcounts anew and takes stock of what is still wrong then.
    async fn rebuild(
        &mut self,
        snapshots: &SnapshotTable,
        mut survey: Survey,
        reftable: &[u64],
    ) -> Result<(Survey, Comparison), CheckError> {
        rebuild(&self.file, &mut self.header, &mut survey, reftable).await?;
        let before = survey.report;
        let reftable = self.read_reftable().await?;
        let mut after = self.survey(snapshots, &reftable, false).await?;
        after.notes = survey.notes;
        let blocks = Blocks::new(&self.file, after.geometry, &reftable);
        let comparison = blocks.compare(&mut after, Repair::Leaks).await?;
        let report = &mut after.report;
        report.check_errors = before.check_errors;
        report.leaks = comparison.leaks;
        report.corruptions_fixed =
            before.corruptions_fixed + before.corruptions.saturating_sub(report.corruptions);
        report.leaks_fixed = before.leaks_fixed + before.leaks;
        Ok((after, comparison))
    }

    /// Empties entries of L2 tables that reserve places which cannot be.
    async fn mend_tables(&self, survey: &mut Survey) -> Result<(), CheckError> {
        for offset in std::mem::take(&mut survey.tables_to_mend) {
            if !survey.is_only_table(offset) {
                survey.leave_alone(offset);
                continue;
            }
            let old = self
                .file
                .read_table(offset, survey.geometry.cluster_size() / 8)
                .await
                .map_err(|errno| CheckError::read("an L2 table", offset, errno))?;
            let mut new = old.clone();
            let mended = tables::mend(&mut new, &survey.geometry);
            write_changes(&self.file, offset, &old, &new).await?;
            survey.report.corruptions = survey.report.corruptions.saturating_sub(mended);
            survey.report.corruptions_fixed += mended;
        }
        self.flush().await
    }

    async fn check_flags(
        &self,
        snapshots: &SnapshotTable,
        survey: &mut Survey,
        comparison: &Comparison,
    ) -> Result<(), CheckError> {
        let reftable = self.read_reftable().await?;
        let report = &survey.report;
        let is_sound = report.check_errors + report.corruptions + report.leaks == 0;
        let flags = Flags {
            subject: Subject {
                file: &self.file,
                header: &self.header,
                snapshots,
                reftable: &reftable,
                repairs_all: false,
            },
            blocks: &Blocks::new(&self.file, survey.geometry, &reftable),
            comparison,
            repairs: match self.repair {
                Repair::Nothing => false,
                Repair::Leaks => is_sound,
                Repair::All => true,
            },
        };
        let count = flags.check(survey).await?;
        survey.report.corruptions += count.corruptions;
        survey.report.corruptions_fixed += count.fixed;
        self.flush().await
    }

    /// Writes the snapshot table anew, complete, and gives up the old one.
    async fn mend_snapshots(
        &mut self,
        snapshots: &SnapshotTable,
        survey: &mut Survey,
    ) -> Result<(), CheckError> {
        let bits = survey.geometry.cluster_bits;
        let table = snapshots.mended(&self.file, &self.header).await?;
        let len = table.len() as u64;
        let old_start = self.header.raw.snapshots_offset.get();
        let old = old_start >> bits..survey.geometry.clusters_for(old_start + snapshots.bytes);
        let mut offset = 0;
        if len > 0 {
            let place = Space::new().take(survey, survey.geometry.clusters_for(len));
            offset = place.start << bits;
            self.set_counts(survey, place, 1).await?;
            self.file
                .write(offset, &table)
                .await
                .map_err(|errno| CheckError::write("the snapshot table", offset, errno))?;
            self.flush().await?;
        }
        self.header.raw.snapshots_offset = offset.into();
        self.header.raw.nb_snapshots = snapshots.count().into();
        self.file.write_header(&self.header).await?;
        let alone = |cluster| survey.references.get(cluster) == 1;
        if !survey.overflow && old.clone().all(alone) {
            survey.references.subtract(old.clone());
            self.set_counts(survey, old, 0).await?;
        }
        Ok(())
    }

    /// Brings the counts of these clusters to disk, with a new structure if blocks are missing.
    async fn set_counts(
        &mut self,
        survey: &mut Survey,
        clusters: Range<u64>,
        count: u64,
    ) -> Result<(), CheckError> {
        let reftable = self.read_reftable().await?;
        let blocks = Blocks::new(&self.file, survey.geometry, &reftable);
        if !blocks.set(clusters, count).await? {
            rebuild(&self.file, &mut self.header, survey, &reftable).await?;
        }
        self.flush().await
    }

    /// Says in the header that the image is sound, if it is, and gives back the space of leaks.
    async fn finish(&mut self, report: &Report, comparison: &Comparison) -> Result<(), CheckError> {
        if self.repair == Repair::Nothing || report.check_errors + report.corruptions > 0 {
            return Ok(());
        }
        let doubts = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.header.incompatible().intersects(doubts) {
            self.flush().await?;
            self.header.set_incompatible(doubts, false);
            self.file.write_header(&self.header).await?;
        }
        let bits = self.header.geometry.cluster_bits;
        for range in &comparison.freed {
            let len = (range.end - range.start) << bits;
            // To get space back is a courtesy.
            let _ = self.file.discard(range.start << bits, len).await;
        }
        Ok(())
    }
}

fn add(report: &mut Report, found: &Comparison) {
    report.corruptions += found.corruptions;
    report.leaks += found.leaks;
    report.check_errors += found.check_errors;
    report.corruptions_fixed += found.corruptions_fixed;
    report.leaks_fixed += found.leaks_fixed;
}
