//! Objects that users create: threads, secrets, TLS credentials, and rules about who may come in;
//! and the tree in which they are found.

use serde_json::Value;

use crate::Qapi;

/// What `object-add` and `--object` create.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ObjectOptions {
    /// The type and its properties.
    #[qapi(union = "qom-type")]
    pub kind: ObjectKind,
    /// The object's unique id.
    pub id: String,
}

/// A type of object and its properties.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum ObjectKind {
    /// A rule that compares names with patterns.
    AuthzList(AuthZListProperties),
    /// The same, read from a file, under the name that the reference's documentation gives it.
    AuthzListFile(AuthZListFileProperties),
    /// The same, under the name in the reference's schema.
    AuthzListfile(AuthZListFileProperties),
    /// A rule that lets one name in.
    AuthzSimple(AuthZSimpleProperties),
    /// A thread that serves I/O.
    Iothread(IothreadProperties),
    /// The thread that serves everything else.
    MainLoop(EventLoopBaseProperties),
    /// Bytes to be kept secret.
    Secret(SecretProperties),
    /// Bytes to be kept secret, from the kernel's keyrings.
    #[qapi(rename = "secret_keyring")]
    SecretKeyring(SecretKeyringProperties),
    /// A thread whose children run where it may run.
    ThreadContext(ThreadContextProperties),
    /// TLS without any proof of who somebody is.
    TlsCredsAnon(TlsCredsAnonProperties),
    /// TLS with keys that both sides were given beforehand.
    TlsCredsPsk(TlsCredsPskProperties),
    /// TLS with certificates.
    TlsCredsX509(TlsCredsX509Properties),
}

/// What every event loop has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct EventLoopBaseProperties {
    /// The most requests submitted in one batch; 0 leaves it to the daemon.
    pub aio_max_batch: Option<i64>,
    /// The fewest threads its blocking pool keeps.
    pub thread_pool_min: Option<i64>,
    /// The most threads its blocking pool starts.
    pub thread_pool_max: Option<i64>,
}

/// What an iothread has besides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct IothreadProperties {
    /// What every event loop has.
    #[qapi(flatten)]
    pub event_loop: EventLoopBaseProperties,
    /// The longest time to poll before sleeping, in nanoseconds; 0 does not poll.
    pub poll_max_ns: Option<i64>,
    /// The factor by which polling grows; 0 picks one.
    pub poll_grow: Option<i64>,
    /// The divisor by which polling shrinks; 0 resets it.
    pub poll_shrink: Option<i64>,
}

/// How a secret is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QCryptoSecretFormat {
    /// As it is.
    Raw,
    /// In base64.
    Base64,
}

/// What every secret has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct SecretCommonProperties {
    /// How the bytes are written; default `raw`.
    pub format: Option<QCryptoSecretFormat>,
    /// The secret they are encrypted under, if they are.
    pub keyid: Option<String>,
    /// The initialization vector of the encryption, in base64.
    pub iv: Option<String>,
}

/// A secret given as text or as a file, one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct SecretProperties {
    /// What every secret has.
    #[qapi(flatten)]
    pub common: SecretCommonProperties,
    /// The bytes.
    pub data: Option<String>,
    /// The file that holds them.
    pub file: Option<String>,
}

/// A secret in the kernel's keyrings.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SecretKeyringProperties {
    /// What every secret has.
    #[qapi(flatten)]
    pub common: SecretCommonProperties,
    /// The key's serial number.
    pub serial: i32,
}

/// Whether to let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QAuthZListPolicy {
    /// No.
    Deny,
    /// Yes.
    Allow,
}

/// How a name is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QAuthZListFormat {
    /// It must be the same.
    Exact,
    /// With a pattern, in which `*` stands for any text and `?` for any character.
    Glob,
}

/// What is to be done with certain names.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct QAuthZListRule {
    /// The name, or the pattern.
    pub r#match: String,
    /// What to do with a name that matches.
    pub policy: QAuthZListPolicy,
    /// How to compare; default `exact`.
    pub format: Option<QAuthZListFormat>,
}

/// Rules, of which the first that matches counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct AuthZListProperties {
    /// What to do with names that no rule matches; default `deny`.
    pub policy: Option<QAuthZListPolicy>,
    /// The rules; default none.
    pub rules: Option<Vec<QAuthZListRule>>,
}

/// Rules that a file holds.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct AuthZListFileProperties {
    /// The file, in it JSON with the members of [`AuthZListProperties`].
    pub filename: String,
    /// Whether to read it again whenever it has changed; default on.
    pub refresh: Option<bool>,
}

/// A single name.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct AuthZSimpleProperties {
    /// The name to let in.
    pub identity: String,
}

/// Where a thread may run, said in one of two ways.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ThreadContextProperties {
    /// The CPUs; default those of the daemon.
    pub cpu_affinity: Option<Vec<u16>>,
    /// The NUMA nodes whose CPUs they are.
    pub node_affinity: Option<Vec<u16>>,
}

/// The side of a TLS connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QCryptoTLSCredsEndpoint {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// What all TLS credentials have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct TlsCredsProperties {
    /// Whether peers must prove who they are; default on.
    pub verify_peer: Option<bool>,
    /// The directory of the files.
    pub dir: Option<String>,
    /// The side of connections that they are for; default `client`.
    pub endpoint: Option<QCryptoTLSCredsEndpoint>,
    /// What of TLS may be used, as a priority string of GnuTLS's; default `NORMAL`.
    pub priority: Option<String>,
}

/// Credentials that prove nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct TlsCredsAnonProperties {
    /// What all TLS credentials have.
    #[qapi(flatten)]
    pub common: TlsCredsProperties,
}

/// Keys that both sides were given beforehand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct TlsCredsPskProperties {
    /// What all TLS credentials have.
    #[qapi(flatten)]
    pub common: TlsCredsProperties,
    /// The user that a client is; default `qemu`.
    pub username: Option<String>,
}

/// Certificates and their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct TlsCredsX509Properties {
    /// What all TLS credentials have.
    #[qapi(flatten)]
    pub common: TlsCredsProperties,
    /// Whether to look the certificates over before they are used; default on.
    pub sanity_check: Option<bool>,
    /// The secret that the key is encrypted under, if it is.
    pub passwordid: Option<String>,
}

/// Arguments of `object-del`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ObjectDel {
    /// The object to remove.
    pub id: String,
}

/// Arguments of `qom-list`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct QomList {
    /// The path of an object.
    pub path: String,
}

/// Arguments of `qom-get`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct QomGet {
    /// The path of an object.
    pub path: String,
    /// The property's name.
    pub property: String,
}

/// Arguments of `qom-set`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct QomSet {
    /// The path of an object.
    pub path: String,
    /// The property's name.
    pub property: String,
    /// What to set it to.
    pub value: Value,
}

/// Arguments of `qom-list-types`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct QomListTypes {
    /// The type that those listed are to be of; default any.
    pub implements: Option<String>,
    /// Whether to list types that no object is of, but only other types; default off.
    pub r#abstract: Option<bool>,
}

/// Arguments of `qom-list-properties`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct QomListProperties {
    /// The type.
    pub typename: String,
}

/// A property, as `qom-list` and `qom-list-properties` report it.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ObjectPropertyInfo {
    /// The name.
    pub name: String,
    /// The type of its value.
    pub r#type: String,
    /// What it is for.
    pub description: Option<String>,
    /// Its value unless set.
    pub default_value: Option<Value>,
}

/// A type, as `qom-list-types` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ObjectTypeInfo {
    /// The name.
    pub name: String,
    /// Whether no object is of it, but only other types.
    pub r#abstract: Option<bool>,
    /// The type it extends.
    pub parent: Option<String>,
}
