//! The names of the priority classes, as the keys file and its users say them.

use kvern_core::ClassId;

/// Names of the classes, the most urgent first, and which of them a request has that asks for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassNames {
    names: Vec<String>,
    default: ClassId,
}

impl ClassNames {
    /// # Panics
    /// When there are no names, more than 256, or `default` is none of them.
    #[must_use]
    pub fn new(names: Vec<String>, default: ClassId) -> Self {
        assert!(usize::from(default.0) < names.len() && names.len() <= 256, "{} classes, {default:?}", names.len());
        ClassNames { names, default }
    }

    /// Of these, `normal` is the default, or else the one in the middle.
    ///
    /// # Panics
    /// When there are no names or more than 256.
    #[must_use]
    pub fn from_names(names: Vec<String>) -> Self {
        let normal = names.iter().position(|name| name == "normal");
        let default = normal.unwrap_or(names.len().saturating_sub(1) / 2);
        ClassNames::new(names, ClassId(default as u8))
    }

    /// The class of a name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<ClassId> {
        self.names.iter().position(|known| known == name).map(|at| ClassId(at as u8))
    }

    /// The class of a request that asks for none, where its key says none.
    #[must_use]
    pub fn default_class(&self) -> ClassId {
        self.default
    }

    /// The least urgent class.
    #[must_use]
    pub fn last(&self) -> ClassId {
        ClassId((self.names.len() - 1) as u8)
    }

    /// All names in one text, for messages.
    pub(super) fn listed(&self) -> String {
        self.names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    }
}

/// `high`, `normal`, `low`; `normal` unless asked otherwise.
impl Default for ClassNames {
    fn default() -> Self {
        ClassNames::from_names(["high", "normal", "low"].map(str::to_owned).to_vec())
    }
}
