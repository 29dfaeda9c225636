//! Rules one after the other: the first that matches a name decides, and if none does, the policy.

use std::sync::{PoisonError, RwLock};

use stord_qmp::schema::object::{
    AuthZListProperties, QAuthZListFormat, QAuthZListPolicy, QAuthZListRule,
};

use super::Authorization;

/// A list of rules.
pub struct List(RwLock<AuthZListProperties>);

impl List {
    /// These rules.
    pub fn new(properties: AuthZListProperties) -> Self {
        Self(RwLock::new(properties))
    }

    /// What decides about names that no rule matches.
    pub fn policy(&self) -> QAuthZListPolicy {
        let properties = self.0.read().unwrap_or_else(PoisonError::into_inner);
        properties.policy.unwrap_or(QAuthZListPolicy::Deny)
    }

    /// Changes what decides about names that no rule matches.
    pub fn set_policy(&self, policy: QAuthZListPolicy) {
        let mut properties = self.0.write().unwrap_or_else(PoisonError::into_inner);
        properties.policy = Some(policy);
    }

    /// The rules.
    pub fn rules(&self) -> Vec<QAuthZListRule> {
        let properties = self.0.read().unwrap_or_else(PoisonError::into_inner);
        properties.rules.clone().unwrap_or_default()
    }

    /// Puts other rules in place of those there are.
    pub fn set_rules(&self, rules: Vec<QAuthZListRule>) {
        let mut properties = self.0.write().unwrap_or_else(PoisonError::into_inner);
        properties.rules = Some(rules);
    }
}

impl Authorization for List {
    fn is_allowed(&self, identity: &str) -> bool {
        let properties = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut rules = properties.rules.iter().flatten();
        let policy = match rules.find(|rule| matches(rule, identity)) {
            Some(rule) => rule.policy,
            None => properties.policy.unwrap_or(QAuthZListPolicy::Deny),
        };
        policy == QAuthZListPolicy::Allow
    }
}

fn matches(rule: &QAuthZListRule, identity: &str) -> bool {
    match rule.format.unwrap_or(QAuthZListFormat::Exact) {
        QAuthZListFormat::Exact => rule.r#match == identity,
        QAuthZListFormat::Glob => glob(&rule.r#match, identity),
    }
}

/// Whether a pattern, with `*` for any text and `?` for any character, matches the whole text.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut from) = (0, 0);
    // Where to go on after a mismatch: behind the last star, one character further.
    let mut retry = None;
    loop {
        match (pattern.get(at), text.get(from)) {
            (Some('*'), _) => {
                retry = Some((at + 1, from + 1));
                at += 1;
            }
            (Some(expected), Some(found)) if *expected == '?' || expected == found => {
                at += 1;
                from += 1;
            }
            (None, None) => return true,
            _ => match retry {
                Some((behind_star, next)) if next <= text.len() => {
                    retry = Some((behind_star, next + 1));
                    (at, from) = (behind_star, next);
                }
                _ => return false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pattern: &str, policy: QAuthZListPolicy, format: QAuthZListFormat) -> QAuthZListRule {
        QAuthZListRule {
            r#match: pattern.to_owned(),
            policy,
            format: Some(format),
        }
    }

    #[test]
    fn first_rule_that_matches_decides() {
        use {QAuthZListFormat::*, QAuthZListPolicy::*};
        let list = List::new(AuthZListProperties {
            policy: Some(Deny),
            rules: Some(vec![
                rule("fred", Deny, Exact),
                rule("f*", Allow, Glob),
                rule("bob", Allow, Exact),
            ]),
        });
        let allowed = |name| list.is_allowed(name);
        assert_eq!(
            ["fred", "frida", "bob", "bobby", ""].map(allowed),
            [false, true, true, false, false]
        );
        list.set_rules(Vec::new());
        assert!(!list.is_allowed("frida"));
        list.set_policy(Allow);
        assert!(list.is_allowed("frida"));
    }

    #[test]
    fn empty_list_lets_nobody_in() {
        assert!(!List::new(AuthZListProperties::default()).is_allowed(""));
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("*", "", true),
            ("a*b", "ab", true),
            ("a*b", "acbcb", true),
            ("a*b", "acbc", false),
            ("a**c?", "abbcd", true),
            ("?", "\u{e4}", true),
            ("?", "", false),
            ("*.example.org", "disk.example.org", true),
            ("*.example.org", "disk.example.org.evil", false),
            ("CN=*,O=x", "CN=a,O=y", false),
            ("[a]", "a", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        let pattern = "a*".repeat(100) + "b";
        assert!(!glob(&pattern, &"a".repeat(10_000)));
    }
}
