package cache

import (
	"bytes"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// sample is data that compresses like files do.
func sample(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	out := make([]byte, 0, n+64)
	for len(out) < n {
		if rng.IntN(3) == 0 {
			out = append(out, bytes.Repeat([]byte{byte(rng.IntN(256))}, rng.IntN(60))...)
		} else {
			out = append(out, strings.Repeat("some text ", rng.IntN(4))...)
			out = append(out, byte(rng.IntN(256)))
		}
	}
	return out[:n]
}

func pressed(t testing.TB, c Compression, data []byte, chunk int) []byte {
	t.Helper()
	c, err := c.normalise()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = compress(c, &out, func(w io.Writer) error {
		for rest := data; len(rest) > 0; {
			n := min(chunk, len(rest))
			if _, err := w.Write(rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// compat: EXP-025
// compat: EXP-027
func TestCompressionIsDeterministic(t *testing.T) {
	one, nine, eleven := 1, 9, 11
	for _, c := range []Compression{
		{}, {Type: "gzip", Level: &one}, {Type: "gzip", Level: &nine},
		{Type: "zstd"}, {Type: "zstd", Level: &eleven}, {Type: "uncompressed"},
	} {
		for _, n := range []int{0, 1, 1000, gzipBlock, 2*gzipBlock + 1} {
			data := sample(n)
			first := pressed(t, c, data, 1<<20)
			for _, chunk := range []int{511, 32 << 10, 5 << 20} {
				if n >= gzipBlock && chunk < 1000 {
					chunk = 4099
				}
				if !bytes.Equal(first, pressed(t, c, data, chunk)) {
					t.Fatalf("%+v: %d bytes in chunks of %d give other bytes", c, n, chunk)
				}
			}
			was := runtime.GOMAXPROCS(1)
			single := pressed(t, c, data, 32<<10)
			runtime.GOMAXPROCS(was)
			if !bytes.Equal(first, single) {
				t.Fatalf("%+v: %d bytes give other bytes on one core", c, n)
			}
			r, err := decompress(bytes.NewReader(first))
			if err != nil {
				t.Fatal(err)
			}
			back, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(back, data) {
				t.Fatalf("%+v: %d bytes don't come back: %v", c, n, err)
			}
			r.Close()
		}
	}
}

func TestCompressionLevelMatters(t *testing.T) {
	one, nine, out := 1, 9, 23
	data := sample(1 << 20)
	if len(pressed(t, Compression{Level: &one}, data, 1<<20)) <= len(pressed(t, Compression{Level: &nine}, data, 1<<20)) {
		t.Error("gzip 9 isn't smaller than gzip 1")
	}
	for _, c := range []Compression{{Type: "bzip2"}, {Level: &out}, {Type: "zstd", Level: &out}} {
		if _, err := c.normalise(); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}

func TestDecompressDamaged(t *testing.T) {
	for _, c := range []Compression{{Type: "gzip"}, {Type: "zstd"}} {
		data := pressed(t, c, sample(1<<20), 1<<20)
		r, err := decompress(bytes.NewReader(data[:len(data)/2]))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err == nil {
			t.Errorf("%s: half a stream was taken for a whole", c.Type)
		}
		r.Close()
	}
}

func TestLayerTypes(t *testing.T) {
	tests := []struct{ oci, docker string }{
		{ocispec.MediaTypeImageLayer, "application/vnd.docker.image.rootfs.diff.tar"},
		{ocispec.MediaTypeImageLayerGzip, "application/vnd.docker.image.rootfs.diff.tar.gzip"},
		{ocispec.MediaTypeImageLayerZstd, "application/vnd.docker.image.rootfs.diff.tar.zstd"},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"},
		{"application/vnd.in-toto+json", "application/vnd.in-toto+json"},
		{"application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"},
	}
	for _, tc := range tests {
		for _, from := range []string{tc.oci, tc.docker} {
			if got := retype(from, true); got != tc.oci {
				t.Errorf("%s as OCI: %s", from, got)
			}
			if got := retype(from, false); got != tc.docker {
				t.Errorf("%s as Docker: %s", from, got)
			}
		}
	}
}
