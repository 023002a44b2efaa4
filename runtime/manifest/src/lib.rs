//! Kubernetes, Istio and Gateway API manifests turned into the model; watches a directory.
