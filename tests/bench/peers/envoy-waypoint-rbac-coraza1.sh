envoy_peer envoy-waypoint-rbac-coraza1 10047 hbone
