envoy_peer envoy-waypoint-rbac-go1 10046 hbone
