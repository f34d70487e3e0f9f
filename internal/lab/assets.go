// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// module is the path of the module that the guest's source belongs to.
const module = "scattergather.io/scattergather"

// Assets are the things from outside that every run needs.
type Assets struct {
	QEMU        string // path of the QEMU binary
	Version     string // its version, such as "10.0.2"
	Kernel      string // path of the guest's kernel
	Initramfs   string // path of the guest's initramfs
	Accelerator string // "kvm" or "tcg"
}

// FindAssets finds QEMU and the guest's kernel, builds the guest's initramfs if
// its program changed, and tries which accelerator boots the guest. What it
// makes is kept in the project's .cache (or $SG_CACHE), where hack/setup.sh put
// the kernel.
func FindAssets(ctx context.Context) (*Assets, error) {
	const advice = "run hack/setup.sh, which installs what the lab needs"
	a := &Assets{}
	var err error
	if a.QEMU, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return nil, fmt.Errorf("no QEMU on this machine: %w; %s", err, advice)
	}
	out, err := exec.CommandContext(ctx, a.QEMU, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", a.QEMU, err)
	}
	match := regexp.MustCompile(`version (\d+\.\d+(\.\d+)?)`).FindSubmatch(out)
	if match == nil {
		return nil, fmt.Errorf("%s --version does not name a version: %q", a.QEMU, out)
	}
	a.Version = string(match[1])
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	a.Kernel = filepath.Join(cache, "kernel", "vmlinuz")
	if _, err := os.Stat(a.Kernel); err != nil {
		return nil, fmt.Errorf("no kernel for the guest: %w; %s", err, advice)
	}
	if a.Initramfs, err = initramfs(ctx, cache); err != nil {
		return nil, err
	}
	a.Accelerator, err = a.chooseAccelerator(ctx, cache)
	return a, err
}

// cacheDir is $SG_CACHE, or .cache in the project that the working directory or
// the program itself lies in.
func cacheDir() (string, error) {
	if dir := os.Getenv("SG_CACHE"); dir != "" {
		return dir, nil
	}
	root, err := projectRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, ".cache"), nil
}

func projectRoot() (string, error) {
	var starts []string
	if dir, err := os.Getwd(); err == nil {
		starts = append(starts, dir)
	}
	if exe, err := os.Executable(); err == nil {
		starts = append(starts, filepath.Dir(exe))
	}
	for _, dir := range starts {
		for ; ; dir = filepath.Dir(dir) {
			mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
			if err == nil && strings.HasPrefix(string(mod), "module "+module+"\n") {
				return dir, nil
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", errors.New("the project's directory is neither above the working directory nor above this program; " +
		"set SG_CACHE to the directory that hack/setup.sh filled")
}

// initramfs gives the path of the guest's initramfs, built anew when the
// guest's program changed.
func initramfs(ctx context.Context, cache string) (string, error) {
	init, err := program(ctx, "labguest")
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(init)
	if err != nil {
		return "", fmt.Errorf("reading the guest's program: %w", err)
	}
	sum := sha256.Sum256(data)
	path := filepath.Join(cache, "initramfs-"+hex.EncodeToString(sum[:6])+".cpio")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	old, _ := filepath.Glob(filepath.Join(cache, "initramfs-*.cpio"))
	for _, path := range old {
		// A run of another build of this project may be using a younger one.
		if info, err := os.Stat(path); err == nil && time.Since(info.ModTime()) > 24*time.Hour {
			_ = os.Remove(path)
		}
	}
	return path, writeInitramfs(path, init)
}

// program finds one of the project's programs: built beside this one by the
// Makefile, else built now from source.
func program(ctx context.Context, name string) (string, error) {
	if exe, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(exe), name)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	root, err := projectRoot()
	if err != nil {
		return "", err
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(cache, name)
	// Built aside and renamed: several runs may do this at once.
	fresh := fmt.Sprintf("%s.%d", path, os.Getpid())
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", fresh, module+"/cmd/"+name)
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return path, os.Rename(fresh, path)
}
