//! What carries the data of each ordered pair of ranks: peer-to-peer access, or host memory.
//!
//! Invariant: every rank of a group holds the same `Pairs`. They follow from what all ranks have
//! told each other.

use crate::algorithm::{UnknownName, named};
use peerlane_device::abi::MAX_RANKS;
use peerlane_device::pipe::everyone_else;
use std::fmt;
use std::str::FromStr;

/// What carries data from rank to rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// For each ordered pair of ranks: peer-to-peer where the driver offers it and the probe passes,
    /// else host memory.
    #[default]
    Auto,
    /// The sender's GPU writes into the receiver's GPU. A pair that cannot do that is an error.
    P2p,
    /// The sender's GPU writes into pinned host memory, which the receiver's GPU reads. For every
    /// pair, even of ranks on one GPU.
    Host,
}

impl Transport {
    /// All of them.
    pub const ALL: [Transport; 3] = [Transport::Auto, Transport::P2p, Transport::Host];

    /// The name used on the command line, in the environment and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Auto => "auto",
            Transport::P2p => "p2p",
            Transport::Host => "host",
        }
    }
}

impl FromStr for Transport {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Transport, UnknownName> {
        named(text, &Transport::ALL, Transport::name)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which ordered pairs of ranks use host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pairs {
    /// For each sender a bit for every receiver.
    receivers: [u16; MAX_RANKS],
}

const _: () = assert!(MAX_RANKS <= u16::BITS as usize);

impl Pairs {
    /// What the ranks say, in rank order: a bit for every rank that they do not reach otherwise. What they say
    /// of themselves, or of ranks that do not exist, is left out.
    pub(crate) fn of(unreached: &[u16]) -> Pairs {
        let mut pairs = Pairs::default();
        let world = unreached.len().min(MAX_RANKS) as u32;
        for (rank, (to, said)) in (0..).zip(pairs.receivers.iter_mut().zip(unreached)) {
            *to = said & everyone_else(world, rank) as u16;
        }
        pairs
    }

    /// From now on `from` reaches `to` through host memory.
    pub(crate) fn demote(&mut self, from: u32, to: u32) {
        self.receivers[from as usize] |= 1 << to;
    }

    /// Whether `from` reaches `to` through host memory.
    pub(crate) fn by_host(&self, from: u32, to: u32) -> bool {
        self.receivers[from as usize] >> to & 1 != 0
    }

    /// A bit for every rank that reaches `to` through host memory.
    pub(crate) fn senders(&self, to: u32) -> u32 {
        (0..MAX_RANKS as u32).filter(|from| self.by_host(*from, to)).map(|from| 1 << from).sum()
    }

    /// Whether any pair uses host memory.
    pub(crate) fn any(&self) -> bool {
        self.receivers != [0; MAX_RANKS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_read_as_they_are_written() {
        for transport in Transport::ALL {
            assert_eq!(transport.to_string().parse(), Ok(transport));
        }
        for text in ["", "Host", "nvlink", "auto "] {
            let error = text.parse::<Transport>().unwrap_err().to_string();
            assert!(
                error.ends_with(&format!("expected one of auto, p2p, host, got {text}")),
                "{error}"
            );
        }
    }

    #[test]
    fn pairs_are_ordered() {
        let mut pairs = Pairs::of(&[0, 0b101, 0]);
        assert!(pairs.by_host(1, 0) && pairs.by_host(1, 2) && !pairs.by_host(0, 1));
        pairs.demote(2, 0);
        assert_eq!([0, 1, 2].map(|to| pairs.senders(to)), [0b110, 0, 0b010]);
        assert!(pairs.any() && !Pairs::default().any());
        pairs.demote(14, 15);
        assert_eq!(pairs.senders(15), 1 << 14);
    }

    #[test]
    fn nobody_fails_to_reach_itself_or_who_is_not_there() {
        assert_eq!(Pairs::of(&[0b1101, u16::MAX]), Pairs::of(&[0, 0b01]));
        assert!(!Pairs::of(&[u16::MAX]).any());
        assert_eq!(Pairs::of(&[u16::MAX; 17]).senders(15), 0x7fff);
    }
}
