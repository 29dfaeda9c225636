//! Enums: plain enumerations, the branches of flat unions, and alternates.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{DataEnum, DeriveInput, Error, Fields, Ident, Result, Type, Variant};

use crate::attributes::{MemberAttributes, TypeAttributes};
use crate::names;

struct Case<'a> {
    ident: &'a Ident,
    /// What the variant holds, if anything.
    content: Option<&'a Type>,
    wire_name: String,
    features: Vec<String>,
}

impl<'a> Case<'a> {
    fn parse(variant: &'a Variant) -> Result<Self> {
        let attributes = MemberAttributes::parse(&variant.attrs)?;
        let content = match &variant.fields {
            Fields::Unit => None,
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                fields.unnamed.first().map(|field| &field.ty)
            }
            _ => {
                return Err(Error::new_spanned(
                    variant,
                    "a variant holds one type or none",
                ));
            }
        };
        Ok(Self {
            ident: &variant.ident,
            content,
            wire_name: (attributes.rename)
                .unwrap_or_else(|| names::kebab_from_camel(&variant.ident.to_string())),
            features: attributes.features,
        })
    }

    fn parse_all(data: &'a DataEnum) -> Result<Vec<Self>> {
        data.variants.iter().map(Self::parse).collect()
    }

    /// The variant as a pattern that ignores its content.
    fn pattern(&self) -> TokenStream {
        let ident = self.ident;
        match self.content {
            Some(_) => quote!(Self::#ident(_)),
            None => quote!(Self::#ident),
        }
    }

    fn name(&self) -> TokenStream {
        let (name, features) = (&self.wire_name, &self.features);
        quote!(::stord_qmp::visitor::Name { name: #name, features: &[#(#features),*] })
    }
}

/// The inherent `name`, by which code reads back what is on the wire.
fn name_method(cases: &[Case<'_>]) -> TokenStream {
    let patterns = cases.iter().map(Case::pattern);
    let names = cases.iter().map(|case| &case.wire_name);
    quote! {
        /// The name on the wire.
        pub const fn name(&self) -> &'static str {
            match self {
                #(#patterns => #names,)*
            }
        }
    }
}

pub fn expand_enum(
    input: &DeriveInput,
    attributes: &TypeAttributes,
    data: &DataEnum,
) -> Result<TokenStream> {
    let cases = Case::parse_all(data)?;
    if cases.iter().any(|case| case.content.is_some()) {
        let message = "say #[qapi(union)] or #[qapi(alternate)] for variants that hold something";
        return Err(Error::new_spanned(&input.ident, message));
    }
    let name = &input.ident;
    let features = &attributes.features;
    let name_method = name_method(&cases);
    let names = cases.iter().map(Case::name);
    let idents = cases.iter().map(|case| case.ident);

    Ok(quote! {
        impl #name {
            /// Every value, in the order of the schema.
            pub const ALL: &'static [Self] = &[#(Self::#idents),*];

            const NAMES: &'static [::stord_qmp::visitor::Name] = &[#(#names),*];

            #name_method
        }

        impl ::stord_qmp::Qapi for #name {
            const KIND: ::stord_qmp::visitor::Kind = ::stord_qmp::visitor::Kind::String;

            fn decode(
                input: ::stord_qmp::visitor::Input<'_>,
            ) -> ::core::result::Result<Self, ::stord_qmp::Error> {
                input.one_of(Self::NAMES, Self::ALL)
            }

            fn encode(&self) -> ::stord_qmp::visitor::Value {
                self.name().into()
            }

            fn introspect(schema: &mut ::stord_qmp::introspect::Introspection) -> String {
                schema.enumeration::<Self>(Self::NAMES, &[#(#features),*])
            }
        }
    })
}

pub fn expand_union(input: &DeriveInput, data: &DataEnum) -> Result<TokenStream> {
    let cases = Case::parse_all(data)?;
    let name = &input.ident;
    let name_method = name_method(&cases);
    let names = cases.iter().map(Case::name);
    let decoders = cases.iter().map(|case| {
        let ident = case.ident;
        match case.content {
            None => quote!(|_| Ok(Self::#ident)),
            Some(content) => quote! {
                |members| {
                    <#content as ::stord_qmp::visitor::Object>::decode_members(members)
                        .map(Self::#ident)
                }
            },
        }
    });
    let encode = cases.iter().filter_map(|case| {
        let (ident, content) = (case.ident, case.content?);
        Some(quote! {
            Self::#ident(branch) => {
                <#content as ::stord_qmp::visitor::Object>::encode_members(branch, members);
            }
        })
    });
    let bare = cases.iter().filter(|case| case.content.is_none());
    let bare = bare.map(|case| case.ident);
    let branches = cases.iter().map(|case| match case.content {
        Some(content) => quote!(<#content as ::stord_qmp::Qapi>::introspect(schema)),
        None => quote!(<() as ::stord_qmp::Qapi>::introspect(schema)),
    });

    Ok(quote! {
        impl #name {
            #name_method
        }

        impl ::stord_qmp::visitor::Union for #name {
            const TAGS: &'static [::stord_qmp::visitor::Name] = &[#(#names),*];

            const DECODERS: &'static [::stord_qmp::visitor::DecodeBranch<Self>] =
                &[#(#decoders),*];

            fn encode_branch(
                &self,
                tag_name: &str,
                members: &mut ::stord_qmp::visitor::Map<String, ::stord_qmp::visitor::Value>,
            ) {
                members.insert(tag_name.to_owned(), self.name().into());
                match self {
                    #(#encode)*
                    #(Self::#bare => {})*
                }
            }

            fn branches(
                schema: &mut ::stord_qmp::introspect::Introspection,
            ) -> ::std::vec::Vec<String> {
                ::std::vec![#(#branches),*]
            }
        }
    })
}

pub fn expand_alternate(
    input: &DeriveInput,
    attributes: &TypeAttributes,
    data: &DataEnum,
) -> Result<TokenStream> {
    let cases = Case::parse_all(data)?;
    let name = &input.ident;
    let type_name = name.to_string();
    let features = &attributes.features;
    let content = |case: &Case<'_>| match case.content {
        Some(content) => quote!(#content),
        None => quote!(::stord_qmp::builtin::Null),
    };
    let contents: Vec<_> = cases.iter().map(content).collect();
    let decode = cases.iter().zip(&contents).map(|(case, content)| {
        let ident = case.ident;
        let construct = match case.content {
            Some(_) => quote!(.map(Self::#ident)),
            None => quote!(.map(|_| Self::#ident)),
        };
        quote! {
            if kind == <#content as ::stord_qmp::Qapi>::KIND {
                return <#content as ::stord_qmp::Qapi>::decode(input) #construct;
            }
        }
    });
    let encode = cases.iter().map(|case| {
        let ident = case.ident;
        match case.content {
            Some(_) => quote!(Self::#ident(branch) => ::stord_qmp::Qapi::encode(branch)),
            None => quote!(Self::#ident => ::stord_qmp::visitor::Value::Null),
        }
    });

    Ok(quote! {
        impl ::stord_qmp::Qapi for #name {
            const KIND: ::stord_qmp::visitor::Kind = ::stord_qmp::visitor::Kind::Any;

            fn decode(
                input: ::stord_qmp::visitor::Input<'_>,
            ) -> ::core::result::Result<Self, ::stord_qmp::Error> {
                let kind = input.kind();
                #(#decode)*
                Err(input.wrong_type(#type_name))
            }

            fn encode(&self) -> ::stord_qmp::visitor::Value {
                match self {
                    #(#encode,)*
                }
            }

            fn introspect(schema: &mut ::stord_qmp::introspect::Introspection) -> String {
                schema.alternate::<Self>(
                    |schema| ::std::vec![
                        #(<#contents as ::stord_qmp::Qapi>::introspect(schema)),*
                    ],
                    &[#(#features),*],
                )
            }
        }
    })
}
