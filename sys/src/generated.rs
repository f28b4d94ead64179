// The bindings of this machine's own headers, in place of the committed ones.
include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
