"""`make bench`: whole merges by the real command line against the time that reading and writing alone takes."""
