//! The derive that gives decode, encode and introspection of QAPI types.
