//! QMP wire, schema types, visitor, introspection and session of stord.
