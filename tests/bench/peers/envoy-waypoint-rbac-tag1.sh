envoy_peer envoy-waypoint-rbac-tag1 10043 hbone
