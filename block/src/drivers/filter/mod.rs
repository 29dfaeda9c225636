//! Filters: nodes that do something with requests on their way.

pub(crate) mod compress;
