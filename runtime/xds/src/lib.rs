//! Delta ADS client and server; the workload API and the model.
