//! The commands about objects and the tree they are in.

use std::rc::Rc;

use stord_qmp::command::Registry;
use stord_qmp::schema::object::{
    ObjectDel, ObjectOptions, QomGet, QomList, QomListProperties, QomListTypes, QomSet,
};

use crate::daemon::Daemon;
use crate::objects::class;

/// Adds the commands.
pub fn add(registry: &mut Registry<Daemon>) {
    registry.add(
        "object-add",
        |daemon: Rc<Daemon>, options: ObjectOptions| async move {
            daemon.objects.add(options).await
        },
    );
    registry.add(
        "object-del",
        |daemon: Rc<Daemon>, ObjectDel { id }| async move { daemon.objects.del(&id) },
    );
    registry.add(
        "qom-list",
        |daemon: Rc<Daemon>, QomList { path }| async move { daemon.tree().list(&path) },
    );
    registry.add("qom-get", |daemon: Rc<Daemon>, arguments| async move {
        let QomGet { path, property } = arguments;
        daemon.tree().get(&path, &property)
    });
    registry.add("qom-set", |daemon: Rc<Daemon>, arguments| async move {
        let QomSet {
            path,
            property,
            value,
        } = arguments;
        daemon.tree().set(&path, &property, value)
    });
    registry.add(
        "qom-list-types",
        |_: Rc<Daemon>, wanted: QomListTypes| async move { Ok(class::list(&wanted)) },
    );
    registry.add(
        "qom-list-properties",
        |_: Rc<Daemon>, QomListProperties { typename }| async move {
            class::list_properties(&typename)
        },
    );
}
