//! Structs: objects, bases, events, and the common part of flat unions.
//!
//! A union's tag is decoded before all other members and its branch after them, so that the first
//! complaint about a bad union is about its tag.

use proc_macro2::TokenStream;
use quote::{ToTokens, quote};
use syn::{DeriveInput, Error, Field, Fields, Ident, Result, Type, parse_quote};

use crate::attributes::{MemberAttributes, TypeAttributes};
use crate::names;

struct Member<'a> {
    ident: &'a Ident,
    ty: &'a Type,
    wire_name: String,
    attributes: MemberAttributes,
}

impl<'a> Member<'a> {
    fn parse(field: &'a Field, snake_case: bool) -> Result<Self> {
        let ident = field
            .ident
            .as_ref()
            .ok_or_else(|| Error::new_spanned(field, "members need names"))?;
        let attributes = MemberAttributes::parse(&field.attrs)?;
        let rust_name = ident.to_string();
        let wire_name = match &attributes.rename {
            Some(name) => name.clone(),
            None if snake_case => names::without_raw_prefix(&rust_name).to_owned(),
            None => names::kebab_from_snake(&rust_name),
        };
        Ok(Self {
            ident,
            ty: &field.ty,
            wire_name,
            attributes,
        })
    }

    fn is_option(&self) -> bool {
        let text = self.ty.to_token_stream().to_string();
        text.starts_with("Option <")
    }

    fn decode(&self) -> TokenStream {
        let (ty, name) = (self.ty, &self.wire_name);
        if self.attributes.flatten {
            quote!(<#ty as ::stord_qmp::visitor::Object>::decode_members(members)?)
        } else if self.attributes.union.is_some() {
            quote!(decode_branch(members)?)
        } else if self.attributes.size && self.is_option() {
            quote! {
                members.member::<Option<::stord_qmp::builtin::Size>>(#name)?.map(u64::from)
            }
        } else if self.attributes.size {
            quote!(u64::from(members.member::<::stord_qmp::builtin::Size>(#name)?))
        } else {
            quote!(members.member::<#ty>(#name)?)
        }
    }

    fn encode(&self) -> TokenStream {
        let (ident, ty, name) = (self.ident, self.ty, &self.wire_name);
        if self.attributes.flatten {
            quote!(<#ty as ::stord_qmp::visitor::Object>::encode_members(&self.#ident, members);)
        } else if let Some(tag) = &self.attributes.union {
            quote! {
                <#ty as ::stord_qmp::visitor::Union>::encode_branch(&self.#ident, #tag, members);
            }
        } else {
            quote!(::stord_qmp::visitor::encode_member(members, #name, &self.#ident);)
        }
    }

    fn describe(&self) -> TokenStream {
        let (ty, name) = (self.ty, &self.wire_name);
        let features = &self.attributes.features;
        if self.attributes.flatten {
            quote!(<#ty as ::stord_qmp::visitor::Object>::describe(schema, shape);)
        } else if let Some(tag) = &self.attributes.union {
            quote!(shape.union::<#ty>(schema, #tag);)
        } else {
            quote!(shape.member::<#ty>(schema, #name, &[#(#features),*]);)
        }
    }
}

pub fn expand(
    input: &DeriveInput,
    attributes: &TypeAttributes,
    fields: &Fields,
) -> Result<TokenStream> {
    let members = fields
        .iter()
        .map(|field| Member::parse(field, attributes.snake_case))
        .collect::<Result<Vec<_>>>()?;

    let mut generics = input.generics.clone();
    for parameter in input.generics.type_params() {
        let parameter = &parameter.ident;
        let bounds = generics.make_where_clause();
        bounds
            .predicates
            .push(parse_quote!(#parameter: ::stord_qmp::Qapi));
    }
    let (impl_generics, type_generics, where_clause) = generics.split_for_impl();

    let name = &input.ident;
    let features = &attributes.features;
    let decode_tag = members.iter().find_map(|member| {
        let (ty, tag) = (member.ty, member.attributes.union.as_ref()?);
        Some(quote!(let decode_branch = members.tag::<#ty>(#tag)?;))
    });
    let (branches, plain): (Vec<_>, Vec<_>) =
        (members.iter()).partition(|member| member.attributes.union.is_some());
    if branches.len() > 1 {
        return Err(Error::new_spanned(name, "a union has one tag"));
    }
    let decode = plain.iter().chain(&branches).map(|member| {
        let (ident, decode) = (member.ident, member.decode());
        quote!(#ident: #decode)
    });
    let encode = members.iter().map(Member::encode);
    let describe = members.iter().map(Member::describe);
    let event = attributes.event.as_ref().map(|event| {
        quote! {
            impl #impl_generics ::stord_qmp::visitor::EventData for #name #type_generics
            #where_clause
            {
                const NAME: &'static str = #event;
            }
        }
    });

    Ok(quote! {
        impl #impl_generics ::stord_qmp::Qapi for #name #type_generics #where_clause {
            const KIND: ::stord_qmp::visitor::Kind = ::stord_qmp::visitor::Kind::Object;

            fn decode(
                input: ::stord_qmp::visitor::Input<'_>,
            ) -> ::core::result::Result<Self, ::stord_qmp::Error> {
                input.object()
            }

            fn encode(&self) -> ::stord_qmp::visitor::Value {
                ::stord_qmp::visitor::encode_object(self)
            }

            fn introspect(schema: &mut ::stord_qmp::introspect::Introspection) -> String {
                schema.object::<Self>(&[#(#features),*])
            }
        }

        impl #impl_generics ::stord_qmp::visitor::Object for #name #type_generics #where_clause {
            fn decode_members(
                members: &mut ::stord_qmp::visitor::Members<'_>,
            ) -> ::core::result::Result<Self, ::stord_qmp::Error> {
                #decode_tag
                Ok(Self { #(#decode),* })
            }

            fn encode_members(
                &self,
                members: &mut ::stord_qmp::visitor::Map<String, ::stord_qmp::visitor::Value>,
            ) {
                #(#encode)*
            }

            fn describe(
                schema: &mut ::stord_qmp::introspect::Introspection,
                shape: &mut ::stord_qmp::introspect::ObjectShape,
            ) {
                #(#describe)*
            }
        }

        #event
    })
}
