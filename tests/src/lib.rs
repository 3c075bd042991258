//! The harness of the tests that drive skiff from outside.
