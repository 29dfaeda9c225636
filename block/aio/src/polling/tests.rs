//! The adaptive polling time and the spin callbacks.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::{PollParams, Polling, Spinners, spin};

fn polling(max_ns: u64, grow: u64, shrink: u64) -> Polling {
    let mut polling = Polling::default();
    polling.set_params(PollParams {
        max_ns,
        grow,
        shrink,
    });
    polling
}

fn after(polling: &mut Polling, waits: &[u64]) -> u64 {
    for wait in waits {
        polling.waited(Duration::from_nanos(*wait));
    }
    u64::try_from(polling.time().as_nanos()).expect("it is short")
}

#[test]
fn the_time_grows_while_events_come_soon_after_it_and_not_beyond_the_maximum() {
    let mut polling = polling(32_768, 0, 0);
    assert_eq!(after(&mut polling, &[]), 0);
    assert_eq!(after(&mut polling, &[10]), 4000);
    assert_eq!(
        after(&mut polling, &[4000]),
        4000,
        "it was found by polling"
    );
    assert_eq!(after(&mut polling, &[5000]), 8000);
    assert_eq!(after(&mut polling, &[9000, 20_000, 32_768]), 32_768);
}

#[test]
fn the_time_shrinks_when_events_come_late() {
    let mut to_zero = polling(10_000, 0, 0);
    assert_eq!(after(&mut to_zero, &[1, 5000, 9000]), 10_000);
    assert_eq!(after(&mut to_zero, &[10_001]), 0);
    let mut slowly = polling(9000, 3, 2);
    assert_eq!(after(&mut slowly, &[1, 5000]), 9000);
    assert_eq!(after(&mut slowly, &[1_000_000]), 4500);
}

#[test]
fn zero_turns_polling_off() {
    let mut polling = polling(10_000, 0, 0);
    after(&mut polling, &[1, 5000]);
    assert!(polling.is_on());
    polling.set_params(PollParams::default());
    assert!(!polling.is_on());
    assert_eq!(after(&mut polling, &[1, 5000]), 0);
}

#[test]
fn each_callback_is_called_once_and_may_change_the_others() {
    let all = Rc::new(RefCell::new(Spinners::default()));
    let calls = Rc::new(Cell::new(0));
    let count = |calls: &Rc<Cell<u32>>| {
        let calls = Rc::clone(calls);
        move || {
            calls.set(calls.get() + 1);
            calls.get() == 3
        }
    };
    let (adds, counts) = (Rc::clone(&all), count(&calls));
    let mut added = Some(counts);
    let _first = all.borrow_mut().insert(Box::new(move || {
        if let Some(another) = added.take() {
            std::mem::forget(adds.borrow_mut().insert(Box::new(another)));
        }
        false
    }));
    let _second = all.borrow_mut().insert(Box::new(count(&calls)));
    assert!(!spin(&all));
    assert_eq!(calls.get(), 2);
    assert!(spin(&all), "one of the two saw the third call");
    assert_eq!(calls.get(), 4);
}
