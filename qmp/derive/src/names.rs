//! How Rust names are spelled on the wire.

/// `NullCo` as `null-co`.
pub fn kebab_from_camel(name: &str) -> String {
    let mut kebab = String::new();
    for (index, letter) in name.char_indices() {
        if letter.is_ascii_uppercase() && index > 0 {
            kebab.push('-');
        }
        kebab.push(letter.to_ascii_lowercase());
    }
    kebab
}

/// `read_only` as `read-only`, and `r#type` as `type`.
pub fn kebab_from_snake(name: &str) -> String {
    without_raw_prefix(name).replace('_', "-")
}

/// `r#type` as `type`.
pub fn without_raw_prefix(name: &str) -> &str {
    name.strip_prefix("r#").unwrap_or(name)
}
