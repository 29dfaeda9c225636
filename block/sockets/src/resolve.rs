//! Turns the host and port of a TCP address into the socket addresses to try, without blocking the
//! control thread on a name server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use stord_qmp::Error;
use stord_qmp::schema::socket::InetSocketAddress;

/// What a resolved address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// An empty host is every address of this machine.
    Listen,
    /// An empty host is this machine.
    Connect,
}

/// Resolves an address; the result is never empty.
///
/// # Errors
/// The name is unknown, the port is no number, or no address of an allowed family is left.
pub async fn resolve(
    address: &InetSocketAddress,
    purpose: Purpose,
) -> Result<Vec<SocketAddr>, Error> {
    let InetSocketAddress { host, port, .. } = address;
    let failed = |why: &str| {
        Error::generic(format!(
            "address resolution failed for {host}:{port}: {why}"
        ))
    };
    let family = Family::of(address)?;
    let port: u16 = port
        .parse()
        .map_err(|_| failed("Servname not supported for ai_socktype"))?;
    let found: Vec<IpAddr> = if host.is_empty() {
        unspecified(purpose)
    } else if let Ok(numeric) = host.parse() {
        vec![numeric]
    } else if address.numeric == Some(true) {
        return Err(failed("Name or service not known"));
    } else {
        let looked_up = tokio::net::lookup_host((host.as_str(), port)).await;
        let addresses = looked_up.map_err(|error| {
            let text = Error::reason(&error);
            let why = text.strip_prefix("failed to lookup address information: ");
            failed(why.unwrap_or(&text)).with_source(error)
        })?;
        addresses.map(|address| address.ip()).collect()
    };
    let mut allowed: Vec<SocketAddr> = Vec::new();
    for ip in found.into_iter().filter(|ip| family.allows(*ip)) {
        let candidate = SocketAddr::new(ip, port);
        if !allowed.contains(&candidate) {
            allowed.push(candidate);
        }
    }
    if allowed.is_empty() {
        return Err(failed("Address family for hostname not supported"));
    }
    Ok(allowed)
}

fn unspecified(purpose: Purpose) -> Vec<IpAddr> {
    match purpose {
        Purpose::Listen => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        Purpose::Connect => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Any,
    V4,
    V6,
}

impl Family {
    fn of(address: &InetSocketAddress) -> Result<Self, Error> {
        match (address.ipv4, address.ipv6) {
            (Some(false), Some(false)) => {
                Err(Error::generic("Cannot disable IPv4 and IPv6 at same time"))
            }
            (Some(true), Some(true)) | (None, None) => Ok(Self::Any),
            (Some(false), _) | (_, Some(true)) => Ok(Self::V6),
            (Some(true), _) | (_, Some(false)) => Ok(Self::V4),
        }
    }

    fn allows(self, ip: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: &str, port: &str) -> InetSocketAddress {
        InetSocketAddress {
            host: host.to_owned(),
            port: port.to_owned(),
            numeric: None,
            to: None,
            ipv4: None,
            ipv6: None,
            keep_alive: None,
            mptcp: None,
        }
    }

    fn resolve_now(address: &InetSocketAddress) -> Result<Vec<SocketAddr>, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("a runtime without drivers");
        runtime.block_on(resolve(address, Purpose::Listen))
    }

    #[test]
    fn families_are_filtered() {
        let mut any = address("", "7");
        assert_eq!(resolve_now(&any).map(|list| list.len()).ok(), Some(2));
        any.ipv4 = Some(false);
        let only_v6 = resolve_now(&any).expect("an address");
        assert_eq!(only_v6, ["[::]:7".parse().expect("an address")]);
        any.ipv6 = Some(false);
        assert!(resolve_now(&any).is_err());
    }

    #[test]
    fn port_that_is_no_number_is_refused() {
        let error = resolve_now(&address("127.0.0.1", "99999")).expect_err("too large");
        assert_eq!(
            error.message,
            "address resolution failed for 127.0.0.1:99999: \
             Servname not supported for ai_socktype"
        );
    }
}
