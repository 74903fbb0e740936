"""Is SBP worth it on a corpus? Figures of a sample of it, and what is known of such figures (`sbp pilot`)."""
