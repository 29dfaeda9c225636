//! Contexts: starting, running, waking, stopping, on both engines.

mod engines;

use engines::both;

#[test]
fn a_future_runs_on_the_context_and_gives_its_result() {
    both(|which| {
        let context = which.start();
        let index = context.index();
        let seen = context.block_on(|| async { stord_aio::current_index() });
        assert_eq!(seen, Ok(index));
        context.stop();
    });
}
