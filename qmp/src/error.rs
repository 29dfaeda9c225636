//! Every control-path failure is one [`Error`]: what a QMP client reads as class and description,
//! what a person reads on the command line, and the chain of causes behind it.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use serde_json::{Value, json};

/// The error classes of QMP; all but `GenericError` exist because old clients match on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// The command does not exist, or not in this phase of the session.
    CommandNotFound,
    /// The named device or node does not exist.
    DeviceNotFound,
    /// The named device is not active.
    DeviceNotActive,
    /// A required host capability is absent.
    KVMMissingCap,
}

impl ErrorClass {
    /// The class as it is written on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::KVMMissingCap => "KVMMissingCap",
        }
    }
}

/// A failed control operation.
#[derive(Clone, Debug)]
pub struct Error {
    /// What a client may branch on.
    pub class: ErrorClass,
    /// What happened and to what, in the reference's wording where clients match it.
    pub message: String,
    /// What to do about it; printed on the command line, never sent over QMP.
    pub hint: Option<String>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of the given class.
    pub fn new(class: ErrorClass, message: impl Into<String>) -> Self {
        Self {
            class,
            message: message.into(),
            hint: None,
            source: None,
        }
    }

    /// An error of class `GenericError`.
    pub fn generic(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, message)
    }

    /// An error of class `GenericError` that says what failed and why, in the words of the C library.
    pub fn os(what: impl fmt::Display, cause: impl Into<std::io::Error>) -> Self {
        let cause = cause.into();
        let reason = Self::reason(&cause);
        Self::generic(format!("{what}: {reason}")).with_source(cause)
    }

    /// What went wrong in the words of the C library, without Rust's "(os error N)".
    pub fn reason(cause: &std::io::Error) -> String {
        let mut text = cause.to_string();
        if let Some(end) = text.rfind(" (os error ") {
            text.truncate(end);
        }
        text
    }

    /// The same error with advice for a person.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error with its cause, which [`std::error::Error::source`] then returns.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// The same error with `context` in front of its message, as in `"context: message"`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The `error` member of a QMP reply.
    pub fn to_json(&self) -> Value {
        json!({"class": self.class.name(), "desc": self.message})
    }
}

/// Errors are equal if a client cannot tell them apart.
impl PartialEq for Error {
    fn eq(&self, other: &Self) -> bool {
        (self.class, &self.message) == (other.class, &other.message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        }
    }
}
