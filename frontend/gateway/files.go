package gateway

import (
	"context"
	"io/fs"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// ReadFile reads a file, or a range of one, inside a ref.
func (s *Server) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	if req.FilePath == "" {
		return nil, missing("FilePath")
	}
	ref, err := s.ref(req.Ref)
	if err != nil {
		return nil, err
	}
	if ref == nil {
		return nil, notInScratch(req.FilePath)
	}
	data, err := ref.ReadFile(ctx, req.FilePath, req.Range)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadFileResponse{Data: data}, nil
}

// ReadDir lists one directory inside a ref.
func (s *Server) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	if req.DirPath == "" {
		return nil, missing("DirPath")
	}
	ref, err := s.ref(req.Ref)
	if err != nil {
		return nil, err
	}
	if ref == nil {
		if isRoot(req.DirPath) {
			return &gwpb.ReadDirResponse{}, nil
		}
		return nil, notInScratch(req.DirPath)
	}
	entries, err := ref.ReadDir(ctx, req.DirPath, req.IncludePattern)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadDirResponse{Entries: entries}, nil
}

// StatFile describes a path inside a ref.
func (s *Server) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	if req.Path == "" {
		return nil, missing("Path")
	}
	ref, err := s.ref(req.Ref)
	if err != nil {
		return nil, err
	}
	if ref == nil {
		if isRoot(req.Path) {
			return &gwpb.StatFileResponse{Stat: &fstypes.Stat{Path: req.Path, Mode: uint32(fs.ModeDir | 0o755)}}, nil
		}
		return nil, notInScratch(req.Path)
	}
	st, err := ref.StatFile(ctx, req.Path)
	if err != nil {
		return nil, err
	}
	return &gwpb.StatFileResponse{Stat: st}, nil
}

func isRoot(path string) bool { return path == "/" || path == "." || path == "" }

func notInScratch(path string) error {
	return &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}
