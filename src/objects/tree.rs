//! The tree of objects as clients walk it: `/objects/ID` and `/chardevs/ID` for what users created.
//!
//! A path is absolute, or the end of one; of the latter there must be one object only.

use std::rc::Rc;

use serde_json::Value;
use stord_qmp::schema::object::ObjectPropertyInfo;
use stord_qmp::{Error, ErrorClass};

use super::class::{CONTAINER, Class, described};
use super::{Object, Objects, unknown};
use crate::chardev::{Chardev, Chardevs};

/// Everything with a path.
pub struct Tree<'a> {
    /// The objects.
    pub objects: &'a Objects,
    /// The character devices.
    pub chardevs: &'a Chardevs,
}

/// Something with a path.
#[derive(Clone)]
enum Place {
    Container(&'static str),
    Object(String, Rc<dyn Object>),
    Chardev(Rc<Chardev>),
}

/// The containers below the root.
const CONTAINERS: &[&str] = &["/backend", "/chardevs", "/objects"];

impl Tree<'_> {
    /// The properties of the object at the path, its children among them.
    ///
    /// # Errors
    /// There is no such object, or several.
    pub fn list(&self, path: &str) -> Result<Vec<ObjectPropertyInfo>, Error> {
        let place = self.resolve(path)?;
        let mut properties = place.class().describe();
        for child in self.children(&place) {
            let kind = format!("child<{}>", child.class().name);
            properties.push(described(child.name(), &kind));
        }
        Ok(properties)
    }

    /// The value of a property.
    ///
    /// # Errors
    /// There is no such object or property, or it is not to be read.
    pub fn get(&self, path: &str, property: &str) -> Result<Value, Error> {
        let place = self.resolve(path)?;
        let class = place.class();
        if let Some(child) = self.child(&place, property) {
            return Ok(child.path().into());
        }
        let found = class.property(property)?;
        if !found.is_readable() {
            let class = class.name;
            let message = format!("Property '{class}.{property}' is not readable");
            return Err(Error::generic(message));
        }
        match &place {
            _ if property == "type" => Ok(class.name.into()),
            Place::Object(_, object) => object.get(found.name),
            Place::Chardev(device) => {
                let value = device.backend().property(found.name);
                value.ok_or_else(|| unknown(class, property))
            }
            Place::Container(_) => Err(unknown(class, property)),
        }
    }

    /// Changes the value of a property.
    ///
    /// # Errors
    /// There is no such object or property, it is not to be changed, or not to that value.
    pub fn set(&self, path: &str, property: &str, value: Value) -> Result<(), Error> {
        let place = self.resolve(path)?;
        let class = place.class();
        let is_child = self.child(&place, property).is_some();
        let found = match is_child {
            true => None,
            false => Some(class.property(property)?),
        };
        match (&place, found) {
            (Place::Object(_, object), Some(found)) if found.is_writable() => {
                object.set(found.name, value)
            }
            _ => {
                let class = class.name;
                let message = format!("Property '{class}.{property}' is not writable");
                Err(Error::generic(message))
            }
        }
    }

    fn resolve(&self, path: &str) -> Result<Place, Error> {
        let root = Place::Container("/");
        let steps: Vec<&str> = path.split('/').filter(|step| !step.is_empty()).collect();
        let mut found = Vec::new();
        if path.starts_with('/') {
            found.extend(self.descend(root, &steps));
        } else {
            self.search(root, &steps, &mut found);
        }
        match (found.pop(), found.len()) {
            (Some(place), 0) => Ok(place),
            (Some(_), _) => Err(Error::generic(format!("Path '{path}' is ambiguous"))),
            (None, _) => Err(Error::new(
                ErrorClass::DeviceNotFound,
                format!("Device '{path}' not found"),
            )),
        }
    }

    fn descend(&self, from: Place, steps: &[&str]) -> Option<Place> {
        let mut steps = steps.iter();
        steps.try_fold(from, |place, step| self.child(&place, step))
    }

    /// Finds what can be reached by the steps from anywhere.
    fn search(&self, from: Place, steps: &[&str], found: &mut Vec<Place>) {
        for child in self.children(&from) {
            self.search(child, steps, found);
        }
        found.extend(self.descend(from, steps));
    }

    fn child(&self, place: &Place, name: &str) -> Option<Place> {
        let mut children = self.children(place).into_iter();
        children.find(|child| child.name() == name)
    }

    fn children(&self, place: &Place) -> Vec<Place> {
        match place {
            Place::Container("/") => CONTAINERS
                .iter()
                .map(|path| Place::Container(path))
                .collect(),
            Place::Container("/objects") => {
                let objects = self.objects.all();
                let place = |(id, object)| Place::Object(id, object);
                objects.into_iter().map(place).collect()
            }
            Place::Container("/chardevs") => {
                let devices = self.chardevs.all();
                devices.into_iter().map(Place::Chardev).collect()
            }
            _ => Vec::new(),
        }
    }
}

impl Place {
    fn class(&self) -> &'static Class {
        match self {
            Self::Container(_) => &CONTAINER,
            Self::Object(_, object) => object.class(),
            Self::Chardev(device) => device.class(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Container(path) => path.rsplit('/').next().unwrap_or(path),
            Self::Object(id, _) => id,
            Self::Chardev(device) => device.id(),
        }
    }

    fn path(&self) -> String {
        match self {
            Self::Container(path) => (*path).to_owned(),
            Self::Object(id, _) => format!("/objects/{id}"),
            Self::Chardev(device) => format!("/chardevs/{}", device.id()),
        }
    }
}
