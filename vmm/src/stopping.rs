//! A machine that was asked to stop: when its power button is pressed, when again, and when patience ends. Main thread.
//!
//! The button is an edge. A guest that has not enabled its interrupt loses it, so it is not pressed before; and a kernel
//! that has nobody to tell yet forgets it, so a guest that may still be booting has it pressed again, ever more rarely. One
//! that was up when it was asked is asked once, for it may be asking its user.

use std::io;
use std::time::{Duration, Instant};

/// A machine younger than this may still be booting.
const BOOTING: Duration = Duration::from_secs(60);
/// Time between two looks whether the guest listens to its button by now.
const LOOK: Duration = Duration::from_millis(100);
/// Time between the first press and the second; it doubles with each.
const AGAIN: Duration = Duration::from_secs(1);

/// The request, from when it was made.
#[derive(Debug)]
pub(crate) struct Stopping {
    deadline: Instant,
    /// When to press next.
    next: Option<Instant>,
    /// From the next press to the one after it.
    interval: Duration,
    booting: bool,
}

impl Stopping {
    /// A machine of this `age` is asked `now`, and has the time `grace`.
    pub(crate) fn new(now: Instant, age: Duration, grace: Duration) -> Self {
        Self { deadline: now + grace, next: Some(now), interval: AGAIN, booting: age < BOOTING }
    }

    /// Presses the button if it is time to. `press` says whether the guest listens; if it does not, nothing was done.
    pub(crate) fn press(&mut self, now: Instant, press: impl FnOnce() -> io::Result<bool>) -> io::Result<()> {
        if self.next.is_none_or(|next| now < next) {
            return Ok(());
        }
        if press()? {
            self.next = self.booting.then(|| now + self.interval);
            self.interval *= 2;
        } else {
            self.booting = true;
            self.next = Some(now + LOOK);
        }
        Ok(())
    }

    /// Whether the guest had its time.
    pub(crate) fn is_over(&self, now: Instant) -> bool {
        self.deadline <= now
    }

    /// When there is something to do next.
    pub(crate) fn wake(&self) -> Instant {
        self.next.map_or(self.deadline, |next| next.min(self.deadline))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(30);

    /// Milliseconds after the request at which a guest of this `age`, which listens from `open` on, has its button pressed.
    /// As the main thread does it: nothing happens before `wake`.
    fn presses(age: Duration, open: Duration) -> Vec<u128> {
        let start = Instant::now();
        let mut stopping = Stopping::new(start, age, GRACE);
        let (mut now, mut presses) = (start, Vec::new());
        while !stopping.is_over(now) {
            let press = || {
                let listens = now - start >= open;
                presses.extend(listens.then(|| (now - start).as_millis()));
                Ok(listens)
            };
            stopping.press(now, press).unwrap();
            assert!(stopping.wake() > now, "no spinning");
            now = stopping.wake();
        }
        assert_eq!(now - start, GRACE);
        presses
    }

    #[test]
    fn a_guest_that_is_up_is_asked_once() {
        assert_eq!(presses(BOOTING, Duration::ZERO), [0]);
    }

    #[test]
    fn a_guest_that_may_be_booting_is_asked_again_and_ever_more_rarely() {
        assert_eq!(presses(Duration::from_secs(59), Duration::ZERO), [0, 1000, 3000, 7000, 15_000]);
    }

    #[test]
    fn a_button_is_pressed_when_the_guest_listens_and_not_before() {
        for age in [Duration::ZERO, 2 * BOOTING] {
            assert_eq!(presses(age, Duration::from_millis(2350)), [2400, 3400, 5400, 9400, 17_400]);
        }
        assert_eq!(presses(Duration::ZERO, GRACE), [0; 0]);
    }

    #[test]
    fn a_button_that_cannot_be_pressed_is_said() {
        let now = Instant::now();
        Stopping::new(now, GRACE, GRACE).press(now, || Err(io::ErrorKind::Other.into())).unwrap_err();
    }
}
