//! Tests of the authorization filter.
