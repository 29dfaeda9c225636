//! `#[derive(Qapi)]` turns a Rust type into a type of the schema: strict decoding, encoding and
//! introspection, always in agreement because they come from one description.
//!
//! | Rust | schema | attributes |
//! |---|---|---|
//! | struct | object | `snake_case` keeps underscores in names; `event = "NAME"` |
//! | field | member, optional if `Option` | `rename = "x"`, `size`, `flatten`, `union = "tag"` |
//! | enum of bare names | enum | `rename = "x"` on a variant |
//! | enum with `#[qapi(union)]` | branches of a flat union | a bare variant has no members |
//! | enum with `#[qapi(alternate)]` | alternate, told apart by JSON type | |
//!
//! Everything may carry `features("deprecated", …)`. Names become kebab-case.

mod attributes;
mod enums;
mod names;
mod objects;

use proc_macro::TokenStream;
use syn::{Data, DeriveInput, Error, Result, parse_macro_input};

use attributes::TypeAttributes;

/// Implements `stord_qmp::Qapi` and, by the kind of type, `Object`, `Union` and `EventData`.
#[proc_macro_derive(Qapi, attributes(qapi))]
pub fn derive_qapi(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input)
        .unwrap_or_else(Error::into_compile_error)
        .into()
}

fn expand(input: &DeriveInput) -> Result<proc_macro2::TokenStream> {
    let attributes = TypeAttributes::parse(&input.attrs)?;
    match &input.data {
        Data::Struct(data) => objects::expand(input, &attributes, &data.fields),
        Data::Enum(data) if attributes.union => enums::expand_union(input, data),
        Data::Enum(data) if attributes.alternate => {
            enums::expand_alternate(input, &attributes, data)
        }
        Data::Enum(data) => enums::expand_enum(input, &attributes, data),
        Data::Union(_) => Err(Error::new_spanned(
            &input.ident,
            "a QAPI union is an enum with #[qapi(union)]",
        )),
    }
}
