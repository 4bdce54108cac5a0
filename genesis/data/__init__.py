"""Reading scans, the volume store, the pseudo-label table, patches."""
