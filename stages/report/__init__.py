"""What stage 06 computes, draws and writes, from rows to the page."""
