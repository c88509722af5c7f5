//! `--run-as`: the user that a server started by root becomes.

use std::fmt;
use std::io;
use std::str::FromStr;

use nix::unistd::{self, Gid, Group, Uid, User};

/// The value of `--run-as`: a user and its groups.
#[derive(Clone, Debug)]
pub struct RunAs {
    name: String,
    uid: Uid,
    gid: Gid,
    /// Supplementary groups. Only `gid` if a group is given.
    groups: Vec<Gid>,
}

impl RunAs {
    pub(super) fn is_root(&self) -> bool {
        self.uid.is_root()
    }

    /// Switches all threads (nptl(7)), and checks that the process cannot switch back.
    pub(super) fn switch(&self) -> io::Result<()> {
        let is_root = unistd::geteuid().is_root();
        let hint = |error: nix::Error| match is_root {
            true => error.into(),
            false => io::Error::other(format!("{error} (only root can switch to another user)")),
        };
        unistd::setgroups(&self.groups).map_err(hint)?;
        unistd::setresgid(self.gid, self.gid, self.gid).map_err(hint)?;
        unistd::setresuid(self.uid, self.uid, self.uid).map_err(hint)?;
        let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
        if !self.is_root() && (unistd::setuid(uid).is_ok() || (self.gid != gid && unistd::setgid(gid).is_ok())) {
            return Err(io::Error::other("the process can still become root"));
        }
        Ok(())
    }
}

impl fmt::Display for RunAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}:{})", self.name, self.uid, self.gid)
    }
}

impl FromStr for RunAs {
    type Err = String;

    /// Parses `USER[:GROUP]`, names or numbers.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, group) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
        if name.is_empty() || group == Some("") {
            return Err("expected USER or USER:GROUP".into());
        }
        let found = match name.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(name),
        };
        let user = found.ok().flatten();
        let uid = user.as_ref().map(|user| user.uid).or_else(|| name.parse().ok().map(Uid::from_raw));
        let uid = uid.ok_or_else(|| format!("no such user (create it: useradd --system {name})"))?;
        let (gid, groups) = match (group, &user) {
            (Some(group), _) => {
                let found = Group::from_name(group).ok().flatten().map(|group| group.gid);
                let gid = found.or_else(|| group.parse().ok().map(Gid::from_raw));
                let gid = gid.ok_or_else(|| format!("no such group (create it: groupadd --system {group})"))?;
                (gid, vec![gid])
            }
            (None, Some(user)) => (user.gid, groups_of(user)),
            (None, None) => return Err(format!("no user has this number (write {name}:GROUP)")),
        };
        Ok(Self { name: text.into(), uid, gid, groups })
    }
}

fn groups_of(user: &User) -> Vec<Gid> {
    let name = std::ffi::CString::new(user.name.as_str()).unwrap_or_default();
    unistd::getgrouplist(&name, user.gid).unwrap_or_else(|_| vec![user.gid])
}
