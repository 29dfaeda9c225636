//! The `#[qapi(...)]` attributes of types, fields and variants.

use syn::meta::ParseNestedMeta;
use syn::punctuated::Punctuated;
use syn::{Attribute, LitStr, Result, Token, parenthesized};

/// What may stand on a type.
#[derive(Default)]
pub struct TypeAttributes {
    pub union: bool,
    pub alternate: bool,
    pub snake_case: bool,
    pub event: Option<String>,
    pub features: Vec<String>,
}

impl TypeAttributes {
    pub fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut parsed = Self::default();
        for_each_item(attributes, |item| {
            if item.path.is_ident("union") {
                parsed.union = true;
            } else if item.path.is_ident("alternate") {
                parsed.alternate = true;
            } else if item.path.is_ident("snake_case") {
                parsed.snake_case = true;
            } else if item.path.is_ident("event") {
                parsed.event = Some(string_value(&item)?);
            } else if item.path.is_ident("features") {
                parsed.features = string_list(&item)?;
            } else {
                return Err(item.error("unknown attribute of a type"));
            }
            Ok(())
        })?;
        Ok(parsed)
    }
}

/// What may stand on a field or a variant.
#[derive(Default)]
pub struct MemberAttributes {
    pub rename: Option<String>,
    pub size: bool,
    pub flatten: bool,
    pub union: Option<String>,
    pub features: Vec<String>,
}

impl MemberAttributes {
    pub fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut parsed = Self::default();
        for_each_item(attributes, |item| {
            if item.path.is_ident("rename") {
                parsed.rename = Some(string_value(&item)?);
            } else if item.path.is_ident("size") {
                parsed.size = true;
            } else if item.path.is_ident("flatten") {
                parsed.flatten = true;
            } else if item.path.is_ident("union") {
                parsed.union = Some(string_value(&item)?);
            } else if item.path.is_ident("features") {
                parsed.features = string_list(&item)?;
            } else {
                return Err(item.error("unknown attribute of a member"));
            }
            Ok(())
        })?;
        Ok(parsed)
    }
}

fn for_each_item(
    attributes: &[Attribute],
    mut take: impl FnMut(ParseNestedMeta<'_>) -> Result<()>,
) -> Result<()> {
    let ours = attributes.iter().filter(|a| a.path().is_ident("qapi"));
    for attribute in ours {
        attribute.parse_nested_meta(&mut take)?;
    }
    Ok(())
}

fn string_value(item: &ParseNestedMeta<'_>) -> Result<String> {
    Ok(item.value()?.parse::<LitStr>()?.value())
}

fn string_list(item: &ParseNestedMeta<'_>) -> Result<Vec<String>> {
    let content;
    parenthesized!(content in item.input);
    let names = Punctuated::<LitStr, Token![,]>::parse_terminated(&content)?;
    Ok(names.iter().map(LitStr::value).collect())
}
