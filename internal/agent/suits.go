// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"scattergather.io/scattergather/internal/pages"
	"scattergather.io/scattergather/internal/qemu/qmp"
)

// suits compares the destination QEMU with the VM that is to come. A QEMU that gets a
// VM that it cannot run says why in its own log only. What QEMU does not tell is not
// compared: the stream itself has the last word.
func (h *hypervisor) suits(ctx context.Context, machine string, blocks []pages.Block) error {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	return errors.Join(h.suitsMachine(ctx, machine), h.suitsMemory(ctx, blocks), h.suitsPostcopy(ctx))
}

func (h *hypervisor) suitsMachine(ctx context.Context, machine string) error {
	own, err := property[string](ctx, h.qmp, "/machine", "type")
	if err != nil {
		return err
	}
	// Machine types are classes of objects whose names have this ending.
	if own = strings.TrimSuffix(own, "-machine"); own != "" && own != machine {
		return fmt.Errorf("its machine type is %s, the VM's is %s", own, machine)
	}
	return nil
}

// suitsMemory compares the memory backends, which carry the names of their blocks.
func (h *hypervisor) suitsMemory(ctx context.Context, blocks []pages.Block) error {
	var backends []struct {
		ID   string `json:"id"`
		Size uint64 `json:"size"`
	}
	if err := ignoreRefusal(h.qmp.Execute(ctx, "query-memdev", nil, &backends)); err != nil {
		return fmt.Errorf("asking for its memory: %w", err)
	}
	var errs []error
	for _, backend := range backends {
		for _, b := range blocks {
			if b.Name != backend.ID {
				continue
			}
			if b.Length != backend.Size {
				errs = append(errs, fmt.Errorf("the size of its memory %s is %d bytes, the VM's is %d", b.Name, backend.Size, b.Length))
			}
			errs = append(errs, h.suitsPages(ctx, b))
		}
	}
	return errors.Join(errs...)
}

// suitsPages compares the page size of a block with that of its backend, where that has
// one of its own.
func (h *hypervisor) suitsPages(ctx context.Context, b pages.Block) error {
	huge, err := property[bool](ctx, h.qmp, "/objects/"+b.Name, "hugetlb")
	if err != nil {
		return err
	}
	size := uint64(pages.Size)
	if huge {
		if size, err = property[uint64](ctx, h.qmp, "/objects/"+b.Name, "hugetlbsize"); err != nil || size == 0 {
			return err // the kernel's default, which QEMU does not tell
		}
	}
	path, err := property[string](ctx, h.qmp, "/objects/"+b.Name, "mem-path")
	if err != nil || path != "" {
		return err // the file system decides
	}
	if size != b.PageSize {
		return fmt.Errorf("the page size of its memory %s is %d bytes, the VM's is %d", b.Name, size, b.PageSize)
	}
	return nil
}

func (h *hypervisor) suitsPostcopy(ctx context.Context) error {
	caps, err := h.qmp.Capabilities(ctx)
	if err != nil {
		return fmt.Errorf("asking for its migration capabilities: %w", err)
	}
	if !caps["postcopy-ram"] {
		return errors.New("its capability postcopy-ram is off: post-copy is how pages reach it")
	}
	return nil
}

// property reads a property of an object of QEMU's; what an object does not have is the
// zero value.
func property[T any](ctx context.Context, c *qmp.Client, path, name string) (T, error) {
	var value T
	err := c.Execute(ctx, "qom-get", map[string]string{"path": path, "property": name}, &value)
	if err = ignoreRefusal(err); err != nil {
		return value, fmt.Errorf("asking for %s of %s: %w", name, path, err)
	}
	return value, nil
}

// ignoreRefusal makes nil of QEMU's answer that it does not know or have something.
func ignoreRefusal(err error) error {
	if _, refused := errors.AsType[*qmp.Error](err); refused {
		return nil
	}
	return err
}
