//! Small images made by hand from the specifications, for the tests of this crate.
