"""Many rows times a weight on sm_90, in Gluon."""
