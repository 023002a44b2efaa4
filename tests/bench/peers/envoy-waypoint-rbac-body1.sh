envoy_peer envoy-waypoint-rbac-body1 10045 hbone
