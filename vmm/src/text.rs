//! The program's own text, most of which only ever parses, checks and builds. Main thread.
#![expect(unsafe_code, reason = "the linker's symbols, and madvise on the program itself")]

unsafe extern "C" {
    /// Where the program's image begins (the linker's own symbol).
    static __executable_start: u8;
    /// Where its text ends.
    static etext: u8;
}

/// Takes the program's constants and text out of this process's memory, now that the machine runs: what is executed again comes
/// back from the page cache, a few pages at a time, what only started the machine does not. Nothing is lost if it fails.
pub(crate) fn release() {
    let (start, end) = (&raw const __executable_start, &raw const etext);
    // SAFETY: sysconf reads a constant.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    // The image begins at a page; the page in which the text ends may hold what has been written to since.
    let len = (end.addr() - start.addr()) / page * page;
    // SAFETY: the range is the program's read-only segments: private, mapped from its file and never written, so that each page
    // has the same content whenever it is mapped again (madvise(2), MADV_DONTNEED).
    let result = unsafe { libc::madvise(start.cast_mut().cast(), len, libc::MADV_DONTNEED) };
    if result != 0 {
        tracing::debug!("the program's text stays resident: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of this program's text in memory.
    fn resident() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.contains(" r-xp "));
        let size = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        size.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn the_text_goes_and_comes_back() {
        let before = resident();
        release();
        let after = resident();
        assert!(after < before, "{before} and {after} KiB");
        assert_eq!("2".parse(), Ok(2));
    }
}
