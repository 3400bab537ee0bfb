package gateway

import (
	"context"

	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// NewContainer makes a container under the id that the client chose (GW-050).
// Constraints have no effect: there is one worker.
func (s *Server) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	if req.ContainerID == "" {
		return nil, missing("ContainerID")
	}
	creq := frontend.ContainerRequest{
		ID: req.ContainerID, Network: req.Network, Platform: req.Platform, Hostname: req.Hostname, ExtraHosts: req.ExtraHosts,
	}
	for _, m := range req.Mounts {
		cm := frontend.ContainerMount{Mount: m}
		s.mu.Lock()
		cm.Ref = s.refs[m.GetResultID()] // what is not there the bridge may know
		s.mu.Unlock()
		creq.Mounts = append(creq.Mounts, cm)
	}
	if err := s.reserve(req.ContainerID); err != nil {
		return nil, err
	}
	c, err := s.cfg.Bridge.NewContainer(ctx, creq)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.containers, req.ContainerID)
		return nil, err
	}
	s.containers[req.ContainerID] = c
	return &gwpb.NewContainerResponse{}, nil
}

// reserve takes the id for a container that is being made.
func (s *Server) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.containers[id]; ok {
		return status.Errorf(codes.AlreadyExists, "container %s already exists; choose another id, or release it first", id)
	}
	s.containers[id] = nil
	return nil
}

// container returns the container named id, once it was made.
func (s *Server) container(id string) (frontend.Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, status.Errorf(codes.NotFound, "container %q was released before, or never created", id)
}

// ReleaseContainer ends a container with all its processes. Those that aren't
// released end with the build (GW-052).
func (s *Server) ReleaseContainer(_ context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	c, err := s.container(req.ContainerID)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	delete(s.containers, req.ContainerID)
	s.mu.Unlock()
	if err := c.Release(); err != nil {
		return nil, err
	}
	return &gwpb.ReleaseContainerResponse{}, nil
}

// ReadFileContainer reads a file, or a range of one, in what one of a
// container's mounts shows (GW-062).
func (s *Server) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	c, err := s.container(req.Ref)
	if err != nil {
		return nil, err
	}
	data, err := c.ReadFile(ctx, int(req.MountIndex), req.FilePath, req.Range)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadFileResponse{Data: data}, nil
}

// ReadDirContainer lists a directory likewise.
func (s *Server) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	c, err := s.container(req.Ref)
	if err != nil {
		return nil, err
	}
	entries, err := c.ReadDir(ctx, int(req.MountIndex), req.DirPath, req.IncludePattern)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadDirResponse{Entries: entries}, nil
}

// StatFileContainer describes a path likewise.
func (s *Server) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	c, err := s.container(req.Ref)
	if err != nil {
		return nil, err
	}
	st, err := c.StatFile(ctx, int(req.MountIndex), req.Path)
	if err != nil {
		return nil, err
	}
	return &gwpb.StatFileResponse{Stat: st}, nil
}
