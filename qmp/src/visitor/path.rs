//! Where a value is in the whole input, as error messages write it: `file.server[0].host` in JSON,
//! `file.server.0.host` in keyval. A path borrows from the one before it and costs nothing until it
//! is shown.

use std::fmt;

use super::Form;

/// Where a value is in the whole input.
#[derive(Clone, Copy)]
pub(super) struct Path<'p> {
    /// The place one step back and the step from there; none for the whole input.
    last: Option<(&'p Path<'p>, Step<'p>)>,
    pub(super) depth: usize,
    pub(super) form: Form,
}

#[derive(Clone, Copy)]
pub(super) enum Step<'p> {
    Member(&'p str),
    Index(usize),
}

impl<'p> Path<'p> {
    /// The whole input.
    pub(super) fn root(form: Form) -> Self {
        Path {
            last: None,
            depth: 0,
            form,
        }
    }

    /// One step further.
    pub(super) fn child(&'p self, step: Step<'p>) -> Self {
        Path {
            last: Some((self, step)),
            depth: self.depth + 1,
            form: self.form,
        }
    }
}

impl<'p> Path<'p> {
    /// The last step alone, `null` if it is into a list: the reference has some messages that do
    /// not say more.
    pub(super) fn last_name(&self) -> &'p str {
        match self.last {
            Some((_, Step::Member(name))) => name,
            Some((_, Step::Index(_))) | None => "null",
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((before, step)) = self.last else {
            return Ok(());
        };
        before.fmt(f)?;
        let dot = if before.depth > 0 { "." } else { "" };
        match (step, self.form) {
            (Step::Member(name), _) => write!(f, "{dot}{name}"),
            (Step::Index(index), Form::Json) => write!(f, "[{index}]"),
            (Step::Index(index), Form::Keyval) => write!(f, "{dot}{index}"),
        }
    }
}
