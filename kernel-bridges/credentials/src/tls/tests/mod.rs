//! Credentials of all kinds, loaded and refused, and sessions that talk to each other in memory.

mod loading;
mod made;
mod sessions;
